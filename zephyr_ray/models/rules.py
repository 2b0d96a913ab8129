"""The `rules` judge: answers are checked by code, never by a model's opinion.

Checks of an answer: it keeps the prompt's constraint, it ended by itself, it does not run in a
loop, and (where a sentence encoder is named) it is on topic.
"""

from functools import lru_cache
from typing import Any

from zephyr_ray.engines.base import ModelSpec
from zephyr_ray.models import constraints
from zephyr_ray.models.repetition import loops
from zephyr_ray.models.weights import resolve

Score = dict[str, Any]
"""`{"score": 1-10 or None, "reason": str, "checks": {name: bool}}`"""


class RulesJudge:
    def __init__(self, spec: ModelSpec):
        self._relevance_min = spec.relevance_min
        self._similarity = _Encoder(spec.relevance).similarity if spec.relevance else None

    async def score(self, row: dict[str, Any], completion: dict[str, Any]) -> Score:
        """1 + 9 × the share of checks passed, so 10 is an answer that passes all of them."""
        text, instruction = completion["text"], row["instruction"]
        checks, reasons = {}, []
        if row.get("constraint"):
            checks["constraint"], reason = constraints.holds(row["constraint"], text, instruction)
            reasons.append(f"{row['constraint']['kind']}: {reason}")
        checks["ended"] = completion["finish_reason"] == "stop"
        checks["no_loop"] = bool(text.strip()) and not loops(text)
        if self._similarity:
            similarity = self._similarity(instruction, text)
            checks["on_topic"] = similarity >= self._relevance_min
            reasons.append(f"similarity to the task {similarity:.2f}")
        if not checks["ended"]:
            reasons.append("was cut off at the token limit")
        if not checks["no_loop"]:
            reasons.append("empty" if not text.strip() else "repeats itself")
        score = 1 + 9 * sum(checks.values()) / len(checks)
        return {"score": round(score, 2), "reason": "; ".join(reasons), "checks": checks}

    async def compare(
        self, row: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
    ) -> dict[str, Any]:
        """The answer that passes more checks wins. `verdict` is 1, 0.5 or 0 for `first`."""
        a, b = await self.score(row, first), await self.score(row, second)
        passed, other = sum(a["checks"].values()), sum(b["checks"].values())
        verdict = 1.0 if passed > other else 0.0 if passed < other else 0.5
        reason = (
            f"passes {passed} of {len(a['checks'])} checks, the baseline {other}: {a['reason']}"
        )
        return {"verdict": verdict, "reason": reason, "scores": [a, b]}


class _Encoder:
    """Sentence embeddings by the mean of the last hidden states (all-MiniLM's own pooling)."""

    def __init__(self, weights: str):
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(1)
        folder = resolve(weights)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self._embed = lru_cache(maxsize=4096)(self._embed_one)

    def similarity(self, a: str, b: str) -> float:
        """Cosine similarity of two texts, −1 to 1."""
        return float(self._embed(a) @ self._embed(b))

    def _embed_one(self, text: str) -> Any:
        import torch

        batch = self._tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            mean = self._model(**batch).last_hidden_state[0].mean(0)
        return mean / mean.norm()
