"""A model as judge: what it is asked, and how its words are read. Its answer is data."""

import ast
import json
import re
from typing import Any, Protocol

from zephyr_ray.models.contract import Ask, Reply, user
from zephyr_ray.models.rules import Score

SCORE_TOKENS = 256
RANK_TOKENS = 128


class Judge(Protocol):
    async def score(self, row: dict[str, Any], completion: dict[str, Any]) -> Score: ...

    async def compare(
        self, row: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
    ) -> dict[str, Any]: ...


class ModelJudge:
    """Scores and ranks by asking a model. What cannot be read counts as unparsable, not as 0."""

    def __init__(self, ask: Ask):
        self._ask = ask

    async def score(self, row: dict[str, Any], completion: dict[str, Any]) -> Score:
        reply = await self._ask(
            [
                user(
                    "You grade answers. Judge how well the answer below follows its instruction, "
                    "and how helpful, honest and true it is.\n\n"
                    f"Instruction:\n{row['prompt']}\n\nAnswer:\n{completion['text']}\n\n"
                    'Reply with one JSON object only: {"rationale": "one sentence", '
                    '"score": a whole number from 1 (worst) to 10 (best)}'
                )
            ],
            max_tokens=SCORE_TOKENS,
            shown=False,
        )
        score, reason = read_score(reply.text)
        return {"score": score, "reason": reason, "checks": {}}

    async def compare(
        self, row: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
    ) -> dict[str, Any]:
        """Asked in both orders; a verdict that flips with the order is a tie."""
        if first["text"] == second["text"]:
            return {"verdict": 0.5, "reason": "identical answers", "scores": None}
        straight = await self._rank(row["prompt"], first["text"], second["text"])
        swapped = await self._rank(row["prompt"], second["text"], first["text"])
        reason = f"judge: {straight.text.strip()!r}; in the other order: {swapped.text.strip()!r}"
        winners = read_ranking(straight.text), read_ranking(swapped.text)
        if None in winners:
            return {"verdict": None, "reason": f"unparsable: {reason}", "scores": None}
        wins = [winners[0] == 0, winners[1] == 1]
        if wins[0] != wins[1]:
            return {"verdict": 0.5, "reason": f"flip: {reason}", "scores": None, "flip": True}
        return {"verdict": float(wins[0]), "reason": reason, "scores": None}

    async def _rank(self, prompt: str, output_1: str, output_2: str) -> Reply:
        """The ranking form of AlpacaEval: dictionaries in, a list of model and rank out."""
        outputs = [
            {"model": "model_1", "answer": output_1},
            {"model": "model_2", "answer": output_2},
        ]
        return await self._ask(
            [
                user(
                    "Two models answered the same instruction. Rank them as the majority of "
                    "people would: rank 1 is the better answer.\n\n"
                    f"The instruction, as a Python dictionary:\n{ {'instruction': prompt}!r}\n\n"
                    f"The outputs, as Python dictionaries:\n{outputs!r}\n\n"
                    "Reply with a Python list and nothing else, of the form "
                    "[{'model': 'model_1', 'rank': ...}, {'model': 'model_2', 'rank': ...}]"
                )
            ],
            max_tokens=RANK_TOKENS,
            shown=False,
        )


def read_score(text: str) -> tuple[float | None, str]:
    """(score 1-10 or None, rationale) from a judge's words."""
    # First brace to last brace first: a rationale may have braces in it.
    for found in re.findall(r"(?s)\{.*\}", text) + re.findall(r"\{[^{}]*\}", text):
        value = _literal(found)
        if isinstance(value, dict) and "score" in value:
            score = value["score"]
            whole = isinstance(score, int | float) and not isinstance(score, bool)
            if whole and 1 <= score <= 10:
                return float(score), str(value.get("rationale", ""))
    return None, f"unparsable: {text.strip()!r}"


def read_ranking(text: str) -> int | None:
    """Which output has rank 1, as 0 or 1; None when the words are not a ranking of both."""
    found = re.search(r"\[.*\]", text, re.DOTALL)
    entries = _literal(found.group()) if found else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        return None
    ranks = {str(e.get("model")): e.get("rank") for e in entries}
    if len(entries) != 2 or set(ranks) != {"model_1", "model_2"}:
        return None
    if {str(rank) for rank in ranks.values()} != {"1", "2"}:
        return None
    return 0 if str(ranks["model_1"]) == "1" else 1


def _literal(text: str) -> Any:
    """A Python or JSON literal, or None. Nothing is ever executed."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None
