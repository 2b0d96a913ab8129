"""Compares two answers in both orders: the base of the forms for `pairwise`."""

from typing import ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.judges.form import QUESTION_TOKENS, Answer, Judgement, Row
from zephyr_ray.judges.inquiry import Format, Inquiry, at_once
from zephyr_ray.judges.question import Question
from zephyr_ray.messages import is_same_text

ORDERS = 2
"""Questions per judgement. Both orders are asked, because GPT-4 prefers the first position (52.6%
of 2,999 published verdicts)."""


class Comparison:
    """A form for two answers: `{"verdict": 0 to 1 or None, "orders": […], "reason": text,
    "scores": None}`. Subclasses ask about one order.

    The verdict is the first answer's share of the win (0.5 is a tie): the mean of its shares in the
    two `orders`, as the first and as the second answer that the judge sees. `flip` marks a judge
    that preferred the same position in both orders. A share is None if the reply cannot be parsed;
    then the verdict is too. Answers that look the same tie without a question, and have no orders.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...] | None] = ("first", "second")
    questions: ClassVar[tuple[Question, ...]]
    """The only question of the form."""
    reply: ClassVar[Format]

    async def prefer(
        self, prompt: str, first: str, second: str, inquiry: Inquiry
    ) -> tuple[float | None, str]:
        """Returns the share of the win of `first`, which the judge sees first, and the judge's
        words; the share is None if they cannot be parsed."""
        raise NotImplementedError

    async def judge(self, row: Row, answers: list[Answer], inquiry: Inquiry) -> Judgement:
        prompt = row["prompt"]
        first, second = (answer["text"] for answer in answers)
        if is_same_text(first, second):
            return {"verdict": 0.5, "reason": "identical answers", "scores": None}
        [(straight, said), (swapped, said_swapped)] = await at_once(
            self.prefer(prompt, first, second, inquiry),
            self.prefer(prompt, second, first, inquiry),
        )
        reason = f"judge: {said}; in the other order: {said_swapped}"
        orders = [straight, None if swapped is None else 1 - swapped]
        judgement: Judgement = {"scores": None, "orders": orders}
        if straight is None or swapped is None:
            return {"verdict": None, "reason": f"unparsable: {reason}", **judgement}
        judgement["verdict"] = (straight + 1 - swapped) / 2
        if (straight - 0.5) * (swapped - 0.5) > 0:
            return {"reason": f"flip: {reason}", **judgement, "flip": True}
        return {"reason": reason, **judgement}

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        count = judgements * ORDERS
        tokens = QUESTION_TOKENS + prompt + 2 * answer
        return Calls(count, count * tokens, count * self.reply.max_tokens)
