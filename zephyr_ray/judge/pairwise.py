"""Every model against a baseline on held-out prompts: win rates with intervals, and pass rates."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent
from zephyr_ray.judge.statistics import bootstrap, length_bias, paired_difference
from zephyr_ray.judges import FORMS
from zephyr_ray.models.contract import Ask
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, Stage, Work
from zephyr_ray.store import write_whole


class Pairwise(Stage):
    """Compares the answers of `answers` stages (one model each) with those of `baseline`.

    result.json has, for each model: win rate (ties are one half) with its 95 % bootstrap interval,
    wins, ties, losses, flips and unparsable verdicts, the pass rate overall and by kind of
    constraint, the on-topic rate, mean words, and how often the longer answer won; and the paired
    differences in pass rate between models.
    """

    kind = "pairwise"
    makes = "winrate"

    judge: Annotated[str, Reads("judge", form="pairwise")]
    answers: Annotated[list[str], Reads("completions")] = Field(min_length=1)
    baseline: Annotated[str, Reads("completions")]
    control: Annotated[str | None, Reads("completions")] = None
    """The answers of a model trained without the preference term, to compare the last one with."""
    seed: int = 0

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        names: dict[str, str] = {}
        for stage in self._stages():
            models = set(getattr(reads[stage], "models", []))
            if len(models) > 1:
                raise Permanent(
                    f"'{stage}' has answers of {', '.join(sorted(models))}; it needs one model"
                )
            for model in models:
                if names.setdefault(model, stage) != stage:
                    raise Permanent(f"'{stage}' and '{names[model]}' are both answers of '{model}'")

    def _stages(self) -> list[str]:
        control = [self.control] if self.control else []
        return list(dict.fromkeys([self.baseline, *self.answers, *control]))

    def run(self, work: Work) -> None:
        stages = self._stages()
        answers: dict[str, dict[str, dict[str, Any]]] = {}
        names: dict[str, str] = {}
        prompts: dict[str, dict[str, Any]] = {}
        for stage in stages:
            rows = work.inputs[stage].rows()
            names[stage] = rows[0]["completions"][0]["model"]
            answers[names[stage]] = {row["id"]: row["completions"][0] for row in rows}
            for row in rows:
                if prompts.setdefault(row["id"], row)["prompt"] != row["prompt"]:
                    raise Permanent(
                        f"stage '{work.name}': '{stage}' answers other prompts than "
                        f"'{self.baseline}' (row {row['id']}); give both the same prompts"
                    )
        baseline = names[self.baseline]
        requests = [
            {
                "id": f"{prompt_id}/{model}",
                "model": model,
                **{k: prompts[prompt_id][k] for k in ("instruction", "prompt", "constraint")},
                "prompt_id": prompt_id,
                "first": answers[model][prompt_id],
                "second": answers[baseline][prompt_id],
            }
            for model in answers
            for prompt_id in prompts
            if prompt_id in answers[model] and prompt_id in answers[baseline]
        ]
        judged = run_rows(work, requests, compare, [work.models[self.judge]])
        by_model: dict[str, list[dict[str, Any]]] = {model: [] for model in answers}
        for row in judged:
            by_model[row["model"]].append(row)
        result: dict[str, Any] = {
            "baseline": baseline,
            "judge": self.judge,
            "control": names[self.control] if self.control else None,
            "models": {m: summary(rows, self.seed) for m, rows in by_model.items() if rows},
            "differences": [],
            "notes": [],
        }
        work.counts["unparsable"] = sum(row["verdict"] is None for row in judged)
        work.counts["flips"] = sum(bool(row.get("flip")) for row in judged)
        last = names[self.answers[-1]]
        for other in [m for m in by_model if m != last]:
            difference = pass_difference(by_model[last], by_model[other], self.seed)
            if difference:
                result["differences"].append({"a": last, "b": other, **difference})
        if self.control:
            result["notes"].append(_control_note(result["differences"], last, names[self.control]))
        write_whole(work.folder / "result.json", json.dumps(result, indent=1))
        for model, figures in result["models"].items():
            if model != baseline:
                work.counts[f"win_rate/{model}"] = round(figures["win_rate"], 4)
            if figures["pass_rate"] is not None:
                work.counts[f"pass_rate/{model}"] = round(figures["pass_rate"], 4)
        work.write_rows(_rows(prompts, answers, judged))

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.baseline)

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.baseline)) is None:
            return {}
        # The baseline's answers equal themselves, which costs no call.
        others = [stage for stage in self._stages() if stage != self.baseline]
        tokens = max((reads[stage].answer_bounds()[1] for stage in others), default=0)
        return {self.judge: FORMS["pairwise"].calls(prompts * len(others), PROMPT_TOKENS, tokens)}


async def compare(row: dict[str, Any], ask: Ask) -> dict[str, Any]:
    verdict = await ask.judge("pairwise", row, [row["first"], row["second"]])
    return {
        **{k: row[k] for k in ("id", "prompt_id", "model", "constraint")},
        "words": [len(row[side]["text"].split()) for side in ("first", "second")],
        **verdict,
    }


def passed(row: dict[str, Any]) -> bool | None:
    """Whether the model's answer ended, keeps its constraint and does not loop; None if no rule
    judged it. Being on topic is reported beside it."""
    if not row["scores"]:
        return None
    checks = row["scores"][0]["checks"]
    return all(value for name, value in checks.items() if name != "on_topic")


def summary(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The figures of one model from its judged rows."""
    read = [row for row in rows if row["verdict"] is not None]
    verdicts = [row["verdict"] for row in read]
    tally = Counter(verdicts)
    win_rate, low, high = bootstrap(verdicts, seed) if verdicts else (0.5, 0.0, 1.0)
    passes = [float(p) for row in rows if (p := passed(row)) is not None]
    pass_rate, pass_low, pass_high = bootstrap(passes, seed) if passes else (None, None, None)
    topics = [
        row["scores"][0]["checks"]["on_topic"]
        for row in rows
        if row["scores"] and "on_topic" in row["scores"][0]["checks"]
    ]
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        if row["constraint"] and (held := passed(row)) is not None:
            kinds.setdefault(row["constraint"]["kind"], []).append(held)
    return {
        "win_rate": win_rate,
        "low": low,
        "high": high,
        "wins": tally[1.0],
        "ties": tally[0.5],
        "losses": tally[0.0],
        "flips": sum(bool(row.get("flip")) for row in rows),
        "parse_failures": len(rows) - len(read),
        "prompts": len(rows),
        "pass_rate": pass_rate,
        "pass_low": pass_low,
        "pass_high": pass_high,
        "on_topic": sum(topics) / len(topics) if topics else None,
        "words": sum(row["words"][0] for row in rows) / len(rows),
        "length_bias": length_bias(
            verdicts, [row["words"][0] for row in read], [row["words"][1] for row in read]
        ),
        "by_constraint": {
            kind: {"pass_rate": sum(held) / len(held), "prompts": len(held)}
            for kind, held in sorted(kinds.items())
        },
    }


def pass_difference(
    a: list[dict[str, Any]], b: list[dict[str, Any]], seed: int
) -> dict[str, float] | None:
    """Pass rate of `a` less that of `b` over the prompts both were judged on."""
    of_b = {row["prompt_id"]: passed(row) for row in b}
    pairs = [
        (float(p), float(q))
        for row in a
        if (p := passed(row)) is not None and (q := of_b.get(row["prompt_id"])) is not None
    ]
    if not pairs:
        return None
    mean, low, high = paired_difference([p for p, _ in pairs], [q for _, q in pairs], seed)
    return {"pass_difference": mean, "low": low, "high": high}


def _control_note(differences: list[dict[str, Any]], last: str, control: str) -> str:
    found = next((d for d in differences if d["b"] == control), None)
    if found is None:
        return f"No rule judged {last} and {control}, so the preference term is not isolated."
    if found["low"] > 0:
        verdict = "the preference term adds to what the same answers teach by plain SFT"
    elif found["high"] < 0:
        verdict = "the preference term does harm next to plain SFT on the same answers"
    else:
        verdict = "the preference term adds nothing that these prompts can show"
    return (
        f"{last} against {control}, the control: pass rate {found['pass_difference']:+.3f} "
        f"[{found['low']:+.3f}, {found['high']:+.3f}]: {verdict}."
    )


def _rows(
    prompts: dict[str, dict[str, Any]],
    answers: dict[str, dict[str, dict[str, Any]]],
    judged: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """One row a prompt, with every model's answer and verdict, for the report."""
    verdicts: dict[str, dict[str, Any]] = {}
    for row in judged:
        verdicts.setdefault(row["prompt_id"], {})[row["model"]] = row
    rows = []
    for prompt_id, of_prompt in verdicts.items():
        shown = {}
        for model in of_prompt:
            answer = answers[model][prompt_id]
            scores = of_prompt[model]["scores"]
            shown[model] = {
                "text": answer["text"],
                "finish_reason": answer["finish_reason"],
                "score": scores[0]["score"] if scores else None,
                "reason": scores[0]["reason"] if scores else "",
            }
        rows.append(
            {
                "id": prompt_id,
                "prompt": prompts[prompt_id]["prompt"],
                "constraint": prompts[prompt_id]["constraint"],
                "answers": shown,
                "verdicts": {
                    model: {"verdict": row["verdict"], "reason": row["reason"]}
                    for model, row in of_prompt.items()
                },
            }
        )
    return rows
