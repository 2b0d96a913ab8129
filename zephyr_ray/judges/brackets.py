"""Compares two answers with a verdict in double brackets, as MT-Bench does."""

from typing import Any, ClassVar

from zephyr_ray.judges.comparison import Comparison
from zephyr_ray.judges.inquiry import Format, Inquiry
from zephyr_ray.judges.marks import between_marks
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.verdict import Verdict, last_word

SHARES = {"A": 1.0, "B": 0.0, "C": 0.5}
"""Share of the win of the first answer, by verdict."""


class Brackets(Comparison):
    """The form in which the judge explains its verdict first: [[A]], [[B]], or [[C]] for a tie.

    It has no schema, because an engine that enforced one would leave no room for the explanation.
    """

    name: ClassVar[str] = "brackets"
    questions: ClassVar[tuple[Question, ...]] = (Question.shipped("brackets"),)
    reply: ClassVar[Format] = Format(
        "[[A]] if answer A is better, [[B]] if answer B is better, [[C]] if neither is",
        max_tokens=512,
    )

    async def prefer(
        self, prompt: str, first: str, second: str, inquiry: Inquiry
    ) -> tuple[float | None, str]:
        [question] = self.questions
        judged = "\n".join([prompt, first, second])
        answers = between_marks({"answer_A": first, "answer_B": second})
        verdict, reply = await inquiry.put(
            question,
            {"prompt": prompt, "answers": answers},
            self.reply,
            lambda text, cut: last_word(text, read_brackets, judged, cut),
        )
        return verdict.says, repr(reply)


def read_brackets(value: Any) -> Verdict | None:
    """Returns a verdict with the share of the win of answer A, from a list in a list."""
    match value:
        case [[str(label)]] if label.strip().upper() in SHARES:
            return Verdict(SHARES[label.strip().upper()])
    return None
