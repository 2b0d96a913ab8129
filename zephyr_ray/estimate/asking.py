"""What stages that ask models will need: calls, tokens and dollars of each model asked."""

from dataclasses import dataclass
from typing import Any

from zephyr_ray.engines.base import ModelSpec
from zephyr_ray.models.judging import RANK_TOKENS, SCORE_TOKENS
from zephyr_ray.plan import Step, model_spec
from zephyr_ray.recipe import Recipe

PROMPT, FORM = 256, 128
"""Tokens taken for a prompt whose length is not known, and for a judge's instructions."""


@dataclass(frozen=True)
class Calls:
    """Of one model in one stage. Tokens of answers are the most that are asked for."""

    model: str
    spec: ModelSpec
    calls: float
    tokens_in: float
    tokens_out: float

    @property
    def dollars(self) -> float | None:
        if self.spec.price is None:
            return None
        return (self.tokens_in * self.spec.price[0] + self.tokens_out * self.spec.price[1]) / 1e6


def calls(recipe: Recipe, step: Step, steps: dict[str, Step]) -> list[Calls]:
    """Of every model that a stage asks; nothing where rows are not known, or the kind asks none."""
    stage: Any = step.stage
    made = [
        Calls(ref, model_spec(recipe, ref), *found)
        for what, ref in recipe.reads(stage)
        if what in ("model", "judge") and (found := _calls(stage, what, steps))
    ]
    return [c for c in made if c.spec.engine != "rules"]


def _calls(stage: Any, what: str, steps: dict[str, Step]) -> tuple[float, float, float] | None:
    if stage.kind == "self_refine" and (rows := steps[stage.prompts].rows):
        # Each turn asks for an answer, each but the last for a refined question too.
        count = rows * (2 * stage.turns - 1)
        asked = PROMPT + (stage.turns - 1) * (PROMPT + stage.max_tokens) / 2
        return count, count * asked, rows * stage.turns * stage.max_tokens
    if stage.kind == "completions" and (rows := steps[stage.prompts].rows):
        count = rows * (stage.per_prompt or len(stage.models)) / len(stage.models)
        return count, count * PROMPT, count * stage.max_tokens
    if stage.kind == "feedback" and (rows := steps[stage.completions].rows):
        answers: Any = steps[stage.completions].stage
        count = rows * (answers.per_prompt or len(answers.models))
        return count, count * (FORM + PROMPT + answers.max_tokens), count * SCORE_TOKENS
    if stage.kind == "pairwise" and (rows := steps[stage.baseline].rows):
        # Both orders; the baseline's answers are the same as themselves and cost nothing.
        others = {*stage.answers, *([stage.control] if stage.control else [])} - {stage.baseline}
        count = rows * len(others) * 2
        longest = max(getattr(steps[s].stage, "max_tokens", 512) for s in others)
        return count, count * (FORM + PROMPT + 2 * longest), count * RANK_TOKENS
    if stage.kind == "clean" and what == "judge" and (rows := steps[stage.dialogues].rows):
        source: Any = steps[stage.dialogues].stage
        count = rows * getattr(source, "turns", 1)
        longest = getattr(source, "max_tokens", 512)
        return count, count * (FORM + PROMPT + longest), count * SCORE_TOKENS
    return None
