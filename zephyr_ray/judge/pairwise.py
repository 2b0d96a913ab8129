"""Compares every model with a baseline on held-out prompts: win rates, pass rates, intervals."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent, RowError, suggest
from zephyr_ray.judge.figures import FIGURES, coverage, summary
from zephyr_ray.judge.gathering import Gathered, gather
from zephyr_ray.judge.measures import (
    BOTH_EMPTY,
    Row,
    flipped,
    pass_difference,
    win_differences,
)
from zephyr_ray.judge.section import pairwise_section
from zephyr_ray.judges import PAIRWISE_FORMS, form_identity, reply_tokens, unreadable
from zephyr_ray.messages import visible
from zephyr_ray.models.contract import Ask
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Section
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import Artifact, write_atomically

FIRST_FORM = "pairwise"
"""The default form. Content keys omit its wording; if you change it, raise the stage's version."""


class Pairwise(RowStage):
    """Compares the answers of `answers` stages (one model each) with those of `baseline`.

    Writes to result.json the figures of each model (judge/figures.py), the paired differences in
    win rate between all models, and those in pass rate between the last model and each other one;
    and one row per prompt with all answers and verdicts.
    """

    kind = "pairwise"
    makes = "winrate"

    judge: Annotated[str, Reads("judge", forms_in="form")]
    form: Annotated[str, ADDED] = FIRST_FORM
    """Form of the question: `pairwise` (a ranking), `token` or `brackets`."""
    answers: Annotated[list[str], Reads("completions")] = Field(min_length=1)
    baseline: Annotated[str, Reads("completions")]
    control: Annotated[str | None, Reads("completions")] = None
    """Answers of a model trained without the DPO term; the last model is compared with it."""
    seed: int = 0

    @field_validator("form")
    @classmethod
    def _compares(cls, form: str) -> str:
        if form not in PAIRWISE_FORMS:
            raise ValueError(f"no form '{form}' compares answers{suggest(form, PAIRWISE_FORMS)}")
        return form

    def identity(self) -> dict[str, Any]:
        settings = super().identity()
        return settings | ({"form": form_identity(self.form)} if self.form != FIRST_FORM else {})

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if self._stages() == [self.baseline]:
            raise Permanent(
                f"'{self.baseline}' would be compared only with itself; add the answers of another "
                "model to answers"
            )
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
        program = partial(compare, form=self.form)
        judged = run_rows(work, comparisons, program, [work.models[self.judge]], _flaw)
        result = self._result(gathered, judged)
        write_atomically(work.folder / "result.json", json.dumps(result, indent=1))
        work.counts["unparsable"] = sum(_flaw(row) is not None for row in judged)
        baseline = gathered.models[self.baseline]
        others = [row for row in judged if row["model"] != baseline]
        if empty := sum(row["reason"] == BOTH_EMPTY for row in others):
            work.counts["both_empty"] = empty
        if asked_again := sum(row.get("asked_again", 0) for row in judged):
            work.counts["unparsable_at_first"] = asked_again
        work.counts["flips"] = sum(map(flipped, judged))
        work.counts |= _counts(result)
        work.write_rows(gathered.side_by_side(judged))

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.baseline)

    def answer_tokens(self) -> int:
        return reply_tokens(self.form)

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.baseline)) is None:
            return {}
        # Comparing the baseline with itself costs no call.
        others = [stage for stage in self._stages() if stage != self.baseline]
        tokens = max((reads[stage].answer_bounds()[1] for stage in others), default=0)
        form = PAIRWISE_FORMS[self.form]
        return {self.judge: form.calls(prompts * len(others), PROMPT_TOKENS, tokens)}

    def section(self, artifact: Artifact) -> Section:
        return pairwise_section(artifact)

    def _stages(self) -> list[str]:
        """Returns the stages whose answers are compared, the baseline's first."""
        stages = dict.fromkeys([self.baseline, *self.answers, self.control])
        return [stage for stage in stages if stage]

    def _result(self, gathered: Gathered, judged: list[Row]) -> dict[str, Any]:
        """Computes the content of result.json."""
        models, by_model = gathered.models, gathered.described(judged)
        baseline, last = models[self.baseline], models[self.answers[-1]]
        control = models.get(self.control or "")
        of_last = by_model.get(last, [])
        differences = [
            {"a": last, "b": other, **difference}
            for other, rows in by_model.items()
            if other != last and (difference := pass_difference(of_last, rows, self.seed))
        ]
        compared = {model: rows for model, rows in by_model.items() if model != baseline}
        return {
            "baseline": baseline,
            "judge": self.judge,
            "control": control,
            "models": {
                model: summary(rows, self.seed) | coverage(rows, asked=len(gathered.prompts))
                for model, rows in by_model.items()
            },
            "differences": differences,
            "win_differences": win_differences(compared, self.seed),
        }


def _flaw(row: Row) -> RowError | None:
    return None if row["reason"] == BOTH_EMPTY else unreadable(row)


async def compare(row: Row, ask: Ask, form: str = FIRST_FORM) -> Row:
    """Judges one comparison; a verdict of 1 is a win of `first`. Two empty answers have no
    verdict."""
    sides = [row["first"], row["second"]]
    verdict = await ask.judge(form, row, sides)
    if not any(visible(side["text"]) for side in sides):
        verdict = {**verdict, "verdict": None, "reason": BOTH_EMPTY}
    return {
        **{name: row[name] for name in ("id", "prompt_id", "model", "constraint")},
        **verdict,
    }


def _counts(result: dict[str, Any]) -> dict[str, float]:
    """Returns the plotted figures of every model, as counts of the manifest."""
    return {
        f"{figure.names[0]}/{model}": values[figure.names[0]]
        for model, values in result["models"].items()
        for figure in FIGURES
        if figure.plot and values[figure.names[0]] is not None
        if not (figure.compared and model == result["baseline"])
    }
