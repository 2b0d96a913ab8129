"""Compares every model with a baseline on held-out prompts: win rates, pass rates, intervals."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.judge.figures import BOTH_EMPTY, FIGURES, Row, parsed, pass_difference, summary
from zephyr_ray.judge.gathering import Gathered, gather
from zephyr_ray.judge.section import pairwise_section
from zephyr_ray.judge.wording import control_note
from zephyr_ray.judges import FORMS, reply_tokens, unreadable
from zephyr_ray.messages import visible
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.spacing import spaced
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Section
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import Artifact, write_atomically


class Pairwise(RowStage):
    """Compares the answers of `answers` stages (one model each) with those of `baseline`.

    Writes the figures of each model (judge/figures.py) and the paired differences in pass rate
    between the last model and each other one to result.json, and one row per prompt with all
    answers and verdicts.
    """

    kind = "pairwise"
    makes = "winrate"

    judge: Annotated[str, Reads("judge", form="pairwise")]
    answers: Annotated[list[str], Reads("completions")] = Field(min_length=1)
    baseline: Annotated[str, Reads("completions")]
    control: Annotated[str | None, Reads("completions")] = None
    """Answers of a model trained without the DPO term; the last model is compared with it."""
    seed: int = 0

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        names: dict[str, str] = {}
        for stage in self._stages():
            models = set(getattr(reads[stage], "models", []))
            if len(models) > 1:
                raise Permanent(
                    f"'{stage}' has answers of {', '.join(sorted(models))}; "
                    "it needs one model: make one completions stage per model"
                )
            for model in models:
                if names.setdefault(model, stage) != stage:
                    raise Permanent(
                        f"'{stage}' and '{names[model]}' both have answers of '{model}'; remove one"
                    )

    def run(self, work: Work) -> None:
        gathered = gather(work, self._stages())
        comparisons = list(gathered.comparisons())
        judged = run_rows(work, comparisons, compare, [work.models[self.judge]], _flaw)
        result = self._result(gathered, judged)
        write_atomically(work.folder / "result.json", json.dumps(result, indent=1))
        work.counts["unparsable"] = sum(_flaw(row) is not None for row in judged)
        baseline = gathered.models[self.baseline]
        others = [row for row in judged if row["model"] != baseline]
        if empty := sum(row["reason"] == BOTH_EMPTY for row in others):
            work.counts["both_empty"] = empty
        work.counts["flips"] = sum(bool(row.get("flip")) for row in judged)
        work.counts |= _counts(result)
        work.write_rows(gathered.side_by_side(judged))

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.baseline)

    def answer_tokens(self) -> int:
        return reply_tokens("pairwise")

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.baseline)) is None:
            return {}
        # Comparing the baseline with itself costs no call.
        others = [stage for stage in self._stages() if stage != self.baseline]
        tokens = max((reads[stage].answer_bounds()[1] for stage in others), default=0)
        return {self.judge: FORMS["pairwise"].calls(prompts * len(others), PROMPT_TOKENS, tokens)}

    def section(self, artifact: Artifact) -> Section:
        return pairwise_section(artifact)

    def _stages(self) -> list[str]:
        """Returns the stages whose answers are compared, the baseline's first."""
        stages = dict.fromkeys([self.baseline, *self.answers, self.control])
        return [stage for stage in stages if stage]

    def _result(self, gathered: Gathered, judged: list[Row]) -> dict[str, Any]:
        """Computes the content of result.json."""
        models, prompts = gathered.models, len(gathered.prompts)
        by_model: dict[str, list[Row]] = {model: [] for model in models.values()}
        for row in judged:
            by_model[row["model"]].append(row)
        last, control = models[self.answers[-1]], models.get(self.control or "")
        differences = [
            {"a": last, "b": other, **difference}
            for other, rows in by_model.items()
            if other != last and (difference := pass_difference(by_model[last], rows, self.seed))
        ]
        return {
            "baseline": models[self.baseline],
            "judge": self.judge,
            "control": control,
            "models": {
                model: summary(rows, self.seed) | {"left_out": prompts - len(parsed(rows))}
                for model, rows in by_model.items()
                if rows
            },
            "differences": differences,
            "notes": [control_note(differences, last, control)] if control else [],
        }


def _flaw(row: Row) -> RowError | None:
    return None if row["reason"] == BOTH_EMPTY else unreadable(row)


async def compare(row: Row, ask: Ask) -> Row:
    """Judges one comparison; a verdict of 1 is a win of `first`. Two empty answers have no
    verdict."""
    sides = [row["first"], row["second"]]
    verdict = await ask.judge("pairwise", row, sides)
    if not any(visible(side["text"]) for side in sides):
        verdict = {**verdict, "verdict": None, "reason": BOTH_EMPTY}
    return {
        **{name: row[name] for name in ("id", "prompt_id", "model", "constraint")},
        "words": [len(spaced(side["text"]).split()) for side in sides],
        **verdict,
    }


def _counts(result: dict[str, Any]) -> dict[str, float]:
    """Returns the plotted figures of every model, as counts of the manifest."""
    return {
        f"{figure.names[0]}/{model}": round(values[figure.names[0]], 4)
        for model, values in result["models"].items()
        for figure in FIGURES
        if figure.plot and values[figure.names[0]] is not None
        if not (figure.compared and model == result["baseline"])
    }
