"""Ranks two answers, in both orders, with the prompt format of AlpacaEval."""

from typing import Any, ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.judges.form import QUESTION_TOKENS, Answer, Judgement, Row
from zephyr_ray.judges.literal import number
from zephyr_ray.judges.verdict import Verdict, last_word
from zephyr_ray.messages import is_same_text, user
from zephyr_ray.models.contract import Ask

REPLY_TOKENS = 128
"""Maximum tokens per reply."""
ORDERS = 2
"""Calls per judgement. Both orders are asked, because GPT-4 prefers the first position (52.6% of
2,999 published verdicts)."""


class Ranking:
    """The form for two answers: `{"verdict": 1, 0.5, 0 or None, "reason": text, "scores": None}`.

    The verdict is the first answer's share of the win. Answers that look the same tie; verdicts
    that flip with the order are ties marked by `flip`. The verdict is None if a reply cannot be
    parsed.
    """

    name: ClassVar[str] = "pairwise"
    fields: ClassVar[tuple[str, ...]] = ("first", "second")

    async def judge(self, row: Row, answers: list[Answer], ask: Ask) -> Judgement:
        first, second = (answer["text"] for answer in answers)
        if is_same_text(first, second):
            return {"verdict": 0.5, "reason": "identical answers", "scores": None}
        straight, reply = await _rank(row["prompt"], first, second, ask)
        swapped, other_reply = await _rank(row["prompt"], second, first, ask)
        reason = f"judge: {reply!r}; in the other order: {other_reply!r}"
        if straight is None or swapped is None:
            return {"verdict": None, "reason": f"unparsable: {reason}", "scores": None}
        if straight == swapped:
            return {"verdict": 0.5, "reason": f"flip: {reason}", "scores": None, "flip": True}
        return {"verdict": float(straight == 0), "reason": reason, "scores": None}

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        count = judgements * ORDERS
        tokens = QUESTION_TOKENS + prompt + 2 * answer
        return Calls(count, count * tokens, count * REPLY_TOKENS)


async def _rank(prompt: str, output_1: str, output_2: str, ask: Ask) -> tuple[int | None, str]:
    """Returns the index of the better output, None if the reply is unparsable, and the reply."""
    outputs = [
        {"model": "model_1", "answer": output_1},
        {"model": "model_2", "answer": output_2},
    ]
    reply = await ask(
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
    judged = "\n".join([prompt, output_1, output_2])
    return read_ranking(reply.text, judged, cut=reply.finish_reason == "length"), reply.text.strip()


def read_ranking(text: str, judged: str = "", cut: bool = False) -> int | None:
    """Returns the index (0 or 1) of the output with rank 1, None if unparsable; see `last_word`."""
    verdict = last_word(text, _read, judged, cut)
    return verdict.says if verdict else None


def _read(value: Any) -> Verdict | None:
    entries = value if isinstance(value, list) else []
    if not entries or not all(isinstance(e, dict) and "rank" in e for e in entries):
        return None
    by_rank = {number(e["rank"]): e.get("model") for e in entries}
    order = [by_rank.get(1), by_rank.get(2)]
    if len(entries) != 2 or sorted(map(str, order)) != ["model_1", "model_2"]:
        return Verdict(says=None)
    return Verdict(order.index("model_1"))
