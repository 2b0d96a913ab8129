"""Scores one answer from 1 to 10, with a reason in one sentence."""

import re
from typing import Any, ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.judges.form import QUESTION_TOKENS, Answer, Judgement, Row
from zephyr_ray.judges.literal import number
from zephyr_ray.judges.verdict import Verdict, last_word
from zephyr_ray.messages import user
from zephyr_ray.models.contract import Ask

REPLY_TOKENS = 256
"""Maximum tokens per reply."""

_OF_TEN = re.compile(r"\s*(?:/|out of)\s*10$")
SCORE_CHARACTERS = 20
"""Maximum characters of a score, such as "8.5 out of 10"."""


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
        judged = f"{row['prompt']}\n{answer['text']}"
        score, reason = read_score(reply.text, judged, cut=reply.finish_reason == "length")
        return {"score": score, "reason": reason, "checks": {}}

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        tokens = QUESTION_TOKENS + prompt + answer
        return Calls(judgements, judgements * tokens, judgements * REPLY_TOKENS)


def read_score(text: str, judged: str = "", cut: bool = False) -> tuple[float | None, str]:
    """Returns the score (1 to 10, None if unparsable) and the judge's reason; see `last_word`."""
    verdict = last_word(text, _read, judged, cut)
    if verdict is None:
        return None, f"unparsable: {text.strip()!r}"
    return verdict.says, verdict.reason


def _read(value: Any) -> Verdict | None:
    if not isinstance(value, dict) or "score" not in value:
        return None
    text = str(value["score"]).strip()
    score = number(_OF_TEN.sub("", text)) if len(text) <= SCORE_CHARACTERS else None
    in_range = score is not None and 1 <= score <= 10
    return Verdict(score if in_range else None, str(value.get("rationale") or ""))
