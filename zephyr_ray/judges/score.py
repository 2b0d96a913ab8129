"""Scores one answer from 1 to 10, with a reason in one sentence."""

import re
from typing import ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.judges.form import QUESTION_TOKENS, Answer, Judgement, Row
from zephyr_ray.judges.literal import parse_literal
from zephyr_ray.messages import user
from zephyr_ray.models.contract import Ask

REPLY_TOKENS = 256
"""Maximum tokens per reply."""


class Score:
    """The form for one answer: `{"score": 1-10 or None, "reason": text, "checks": {}}`."""

    name: ClassVar[str] = "score"
    fields: ClassVar[tuple[str, ...]] = ("completion",)

    async def judge(self, row: Row, answers: list[Answer], ask: Ask) -> Judgement:
        [answer] = answers
        reply = await ask(
            [
                user(
                    "You grade answers. Judge how well the answer below follows its instruction, "
                    "and how helpful, honest and true it is.\n\n"
                    f"Instruction:\n{row['prompt']}\n\nAnswer:\n{answer['text']}\n\n"
                    'Reply with one JSON object only: {"rationale": "one sentence", '
                    '"score": a whole number from 1 (worst) to 10 (best)}'
                )
            ],
            max_tokens=REPLY_TOKENS,
            with_demonstrations=False,
        )
        score, reason = read_score(reply.text)
        return {"score": score, "reason": reason, "checks": {}}

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        tokens = QUESTION_TOKENS + prompt + answer
        return Calls(judgements, judgements * tokens, judgements * REPLY_TOKENS)


def read_score(text: str) -> tuple[float | None, str]:
    """Returns (score from 1 to 10, None if unparsable; the judge's reason)."""
    # The span from the first to the last brace comes first: a rationale may contain braces.
    for braced in re.findall(r"(?s)\{.*\}", text) + re.findall(r"\{[^{}]*\}", text):
        value = parse_literal(braced)
        if isinstance(value, dict) and "score" in value:
            score = value["score"]
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            if is_number and 1 <= score <= 10:
                return float(score), str(value.get("rationale", ""))
    return None, f"unparsable: {text.strip()!r}"
