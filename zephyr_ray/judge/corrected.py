"""Corrects the win rates of a comparison with people's votes on the chat page."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent
from zephyr_ray.judge.correction import prediction_powered, share, two_parameter
from zephyr_ray.judge.correction_section import correction_section
from zephyr_ray.judge.voted import Voted, judge_pair, pair_of, voted, why_not_judged
from zephyr_ray.judges import PAIRWISE_FORMS, unreadable
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Section
from zephyr_ray.settings import Reads
from zephyr_ray.stage import ANSWER_TOKENS, PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import Artifact, write_atomically


class Corrected(RowStage):
    """Has the judge of a `pairwise` stage judge the pairs that people voted on, in the same form,
    and corrects the win rate of each model with the votes.

    Writes the corrected rates (judge/correction.py) and the judge's agreement with people to
    result.json, and one row per judged vote.
    """

    kind = "corrected"
    makes = "corrected"
    unit = "votes"

    winrate: Annotated[str, Reads("winrate")]
    votes: Annotated[str, Reads("feedback")]
    judge: Annotated[str, Reads("judge")]
    """The judge of `winrate`."""
    seed: int = 0

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if not reads[self.votes].by_people:
            raise Permanent(f"'{self.votes}' has no human votes; name a stage of kind votes")
        judge = dict(reads[self.winrate])["judge"]
        if judge != self.judge:
            raise Permanent(
                f"the judge of '{self.winrate}' is '{judge}', and '{self.judge}' may make "
                f"other errors; set judge: {judge}"
            )

    def run(self, work: Work) -> None:
        pairs, form = [], _form(work.stages[self.winrate])
        for vote in work.inputs[self.votes].rows():
            if reason := why_not_judged(vote):
                work.count(f"left_out/{reason}", vote["id"])
            else:
                pairs.append(pair_of(vote, form))
        judged = run_rows(work, pairs, judge_pair, [work.models[self.judge]], unreadable)
        work.counts["unparsable"] = sum(unreadable(row) is not None for row in judged)
        result = correct(work.inputs[self.winrate], list(voted(judged)))
        write_atomically(work.folder / "result.json", json.dumps(result, indent=1))
        work.counts |= _counts(result)
        work.write_rows(judged)

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.votes)

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (votes := rows.get(self.votes)) is None:
            return {}
        form = PAIRWISE_FORMS[_form(reads[self.winrate])]
        return {self.judge: form.calls(votes, PROMPT_TOKENS, ANSWER_TOKENS)}

    def section(self, artifact: Artifact) -> Section:
        return correction_section(artifact)


def _form(winrate: Stage) -> str:
    """Returns the form in which a comparison was judged."""
    return str(dict(winrate)["form"])


def correct(winrate: Artifact, votes: list[Voted]) -> dict[str, Any]:
    """Computes the content of result.json from the artifact of a comparison."""
    compared = json.loads(winrate.file("result.json").read_text(encoding="utf-8"))
    decided = [vote for vote in votes if vote.decided]
    by_side = {
        "all": decided,
        "left": [vote for vote in decided if vote.label == 1],
        "right": [vote for vote in decided if vote.label == 0],
    }
    blind = [vote for vote in decided if vote.blind]
    rows, baseline = winrate.rows(), compared["baseline"]
    return {
        "baseline": baseline,
        "judge": compared["judge"],
        "votes": len(votes),
        "ties": len(votes) - len(decided),
        "not_blind": sum(not vote.blind for vote in votes),
        "agreement": {
            side: {"votes": len(group), **_as_dict(share([vote.agreement for vote in group]))}
            for side, group in by_side.items()
        },
        "left_share": {"votes": len(blind), **_as_dict(share([v.label for v in blind]))},
        "models": {
            model: {
                "judge": {n: figures[n] for n in ("win_rate", "low", "high")},
                **_corrections(_verdicts(rows, model), votes, model, baseline),
            }
            for model, figures in compared["models"].items()
            if model != baseline
        },
    }


def _corrections(
    verdicts: list[float], votes: list[Voted], model: str, baseline: str
) -> dict[str, Any]:
    between = [v.seen_from(model, baseline) for v in votes if v.compares(model, baseline)]
    decided = [v.seen_from(model, baseline) for v in votes if v.decided]
    powered = prediction_powered(verdicts, [f for _, f in between], [y for y, _ in between])
    corrected = two_parameter(
        verdicts, [f for y, f in decided if y == 1], [f for y, f in decided if y == 0]
    )
    return {
        "verdicts": len(verdicts),
        "votes": len(between),
        "prediction_powered": powered and asdict(powered),
        "decided_votes": len(decided),
        "two_parameter": asdict(corrected),
    }


def _verdicts(rows: list[dict[str, Any]], model: str) -> list[float]:
    """Returns the readable verdicts on one model's answers to the held-out prompts."""
    verdicts = (row["verdicts"].get(model, {}).get("verdict") for row in rows)
    return [verdict for verdict in verdicts if verdict is not None]


def _as_dict(rate: Any) -> dict[str, float]:
    return asdict(rate) if rate else {}


def _counts(result: dict[str, Any]) -> dict[str, float]:
    """Returns what the manifest counts: votes, agreement and corrected rates."""
    counts = {name: result[name] for name in ("ties", "not_blind")}
    if "rate" in result["agreement"]["all"]:
        counts["agreement"] = result["agreement"]["all"]["rate"]
    for model, figures in result["models"].items():
        if powered := figures["prediction_powered"]:
            counts[f"prediction_powered/{model}"] = powered["rate"]
        if corrected := figures["two_parameter"]["corrected"]:
            counts[f"two_parameter/{model}"] = corrected["rate"]
    return counts
