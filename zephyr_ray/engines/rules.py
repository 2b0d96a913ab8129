"""Judges answers with code, without a language model.

An answer passes if it satisfies the prompt's constraint, ends by itself, does not repeat itself
and, if a sentence encoder is configured, is on topic.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from zephyr_ray.engines.settings import JudgeEngine, ModelSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import number
from zephyr_ray.judges.form import Judgement
from zephyr_ray.messages import visible
from zephyr_ray.models import constraints
from zephyr_ray.models.repetition import loops
from zephyr_ray.models.weights import resolve
from zephyr_ray.settings import WEIGHTS


class RulesSettings(ModelSettings):
    """Settings of the `rules` judge."""

    uses: ClassVar[frozenset[str]] = frozenset({"judge"})
    calls_counted = False
    limits = (
        "The rules check the form of an answer, not its truth: a wrong answer in the right form "
        "passes."
    )

    engine: Literal["rules"] = "rules"
    relevance: Annotated[str | None, WEIGHTS] = None
    """Weights of a sentence encoder that checks whether answers are on topic; None skips the
    check."""
    relevance_min: float = 0.3
    """Minimum cosine similarity between instruction and answer."""

    def start(self, seed: int) -> "RulesJudge":
        return RulesJudge(self)

    def judges(self, form: str) -> bool:
        return form in RulesJudge.CHECKS_BY_FORM


class RulesJudge(JudgeEngine):
    """Scores and compares answers by the checks that they pass."""

    def __init__(self, settings: RulesSettings):
        self._relevance_min = settings.relevance_min
        self._similarity = (
            _SentenceEncoder(settings.relevance).similarity if settings.relevance else None
        )

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> Judgement:
        if form not in self.CHECKS_BY_FORM:
            raise Permanent(f"the rules judge has no form '{form}'; use a language model as judge")
        judgement: Judgement = self.CHECKS_BY_FORM[form](self, row, *answers)
        return judgement

    def score(self, row: dict[str, Any], answer: dict[str, Any]) -> Judgement:
        """Returns the score 1 + 9 × the share of checks passed; an answer that passes all gets
        10."""
        text, instruction = answer["text"], row["instruction"]
        checks, reasons = {}, []
        if row.get("constraint"):
            checks["constraint"], reason = constraints.holds(row["constraint"], text, instruction)
            reasons.append(f"{row['constraint']['kind']}: {reason}")
        checks["ended"] = answer["finish_reason"] == "stop"
        checks["no_loop"] = bool(visible(text)) and not loops(text)
        if self._similarity:
            similarity = self._similarity(instruction, text)
            checks["on_topic"] = similarity >= self._relevance_min
            reasons.append(f"similarity to the task {number(similarity)}")
        if not checks["ended"]:
            reasons.append("was cut off at the token limit")
        if not checks["no_loop"]:
            reasons.append("empty" if not visible(text) else "repeats itself")
        score = 1 + 9 * sum(checks.values()) / len(checks)
        return {"score": score, "reason": "; ".join(reasons), "checks": checks}

    def compare(
        self, row: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
    ) -> Judgement:
        """Returns the verdict 1 if `first` passes more checks, 0 if `second` does, else 0.5."""
        ours, theirs = self.score(row, first), self.score(row, second)
        passed, baseline = sum(ours["checks"].values()), sum(theirs["checks"].values())
        verdict = 1.0 if passed > baseline else 0.0 if passed < baseline else 0.5
        reason = f"passes {passed} of {len(ours['checks'])} checks, the baseline {baseline}"
        if ours["reason"]:
            reason += f": {ours['reason']}"
        return {"verdict": verdict, "reason": reason, "scores": [ours, theirs]}

    CHECKS_BY_FORM: ClassVar[dict[str, Callable[..., Judgement]]] = {
        "score": score,
        "pairwise": compare,
    }


class _SentenceEncoder:
    """A sentence encoder: the mean of the last hidden states, like all-MiniLM."""

    def __init__(self, weights: str):
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(1)
        folder = resolve(weights)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self._embed = lru_cache(maxsize=4096)(self._embed_one)

    def similarity(self, a: str, b: str) -> float:
        """Returns the cosine similarity of two texts, −1 to 1."""
        return float(self._embed(a) @ self._embed(b))

    def _embed_one(self, text: str) -> Any:
        import torch

        batch = self._tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            mean = self._model(**batch).last_hidden_state[0].mean(0)
        return mean / mean.norm()
