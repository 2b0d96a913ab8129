"""Ranks two answers, in both orders, with the prompt format of AlpacaEval."""

import re
from typing import ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.judges.form import QUESTION_TOKENS, Answer, Judgement, Row
from zephyr_ray.judges.literal import parse_literal
from zephyr_ray.messages import user
from zephyr_ray.models.contract import Ask, Reply

REPLY_TOKENS = 128
"""Maximum tokens per reply."""
ORDERS = 2
"""Calls per judgement. Both orders are asked, because GPT-4 prefers the first position (52.6% of
2,999 published verdicts)."""


class Ranking:
    """The form for two answers: `{"verdict": 1, 0.5, 0 or None, "reason": text, "scores": None}`.

    The verdict is the first answer's share of the win. Identical texts are ties; verdicts that flip
    with the order are ties marked by `flip`. The verdict is None if a reply cannot be parsed.
    """

    name: ClassVar[str] = "pairwise"
    fields: ClassVar[tuple[str, ...]] = ("first", "second")

    async def judge(self, row: Row, answers: list[Answer], ask: Ask) -> Judgement:
        first, second = (answer["text"] for answer in answers)
        if first == second:
            return {"verdict": 0.5, "reason": "identical answers", "scores": None}
        straight = await _rank(row["prompt"], first, second, ask)
        swapped = await _rank(row["prompt"], second, first, ask)
        reason = f"judge: {straight.text.strip()!r}; in the other order: {swapped.text.strip()!r}"
        winners = read_ranking(straight.text), read_ranking(swapped.text)
        if None in winners:
            return {"verdict": None, "reason": f"unparsable: {reason}", "scores": None}
        wins = [winners[0] == 0, winners[1] == 1]
        if wins[0] != wins[1]:
            return {"verdict": 0.5, "reason": f"flip: {reason}", "scores": None, "flip": True}
        return {"verdict": float(wins[0]), "reason": reason, "scores": None}

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        count = judgements * ORDERS
        tokens = QUESTION_TOKENS + prompt + 2 * answer
        return Calls(count, count * tokens, count * REPLY_TOKENS)


async def _rank(prompt: str, output_1: str, output_2: str, ask: Ask) -> Reply:
    outputs = [
        {"model": "model_1", "answer": output_1},
        {"model": "model_2", "answer": output_2},
    ]
    return await ask(
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
        max_tokens=REPLY_TOKENS,
        with_demonstrations=False,
    )


def read_ranking(text: str) -> int | None:
    """Returns the index (0 or 1) of the output with rank 1; None if the text does not rank both."""
    bracketed = re.search(r"\[.*\]", text, re.DOTALL)
    entries = parse_literal(bracketed.group()) if bracketed else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        return None
    ranks = {str(e.get("model")): e.get("rank") for e in entries}
    if len(entries) != 2 or set(ranks) != {"model_1", "model_2"}:
        return None
    if {str(rank) for rank in ranks.values()} != {"1", "2"}:
        return None
    return 0 if str(ranks["model_1"]) == "1" else 1
