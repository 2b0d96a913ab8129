"""Compares two answers by the probabilities of two tokens, as AlpacaEval 2 does."""

import math
from typing import ClassVar

from zephyr_ray.formatting import number
from zephyr_ray.judges.comparison import Comparison
from zephyr_ray.judges.inquiry import Format, Inquiry
from zephyr_ray.judges.marks import between_marks
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.verdict import Verdict
from zephyr_ray.models.contract import TopLogprobs

LABELS = ("A", "B")
SHOWN = 3
"""Number of tokens that the reason shows if a reply has no label."""


class Token(Comparison):
    """The form in which the judge replies with one token, A or B: P(A) / (P(A) + P(B)) is the share
    of the win of the first answer, a number between 0 and 1.

    The probabilities are those of the first token of the reply. A label's probability is the sum
    over its spellings in upper and lower case, with or without whitespace around it; it is 0 if
    none of them is among the most likely tokens.
    """

    name: ClassVar[str] = "token"
    questions: ClassVar[tuple[Question, ...]] = (Question.shipped("token"),)
    top_logprobs: ClassVar[int] = 20
    """The maximum of OpenAI's API, and the default maximum of vLLM's server."""
    reply: ClassVar[Format] = Format(" or ".join(LABELS), max_tokens=1, top_logprobs=top_logprobs)

    async def prefer(
        self, prompt: str, first: str, second: str, inquiry: Inquiry
    ) -> tuple[float | None, str]:
        [question] = self.questions
        answers = between_marks({"answer_A": first, "answer_B": second})
        values = {"prompt": prompt, "answers": answers}
        verdict, tokens = await inquiry.put_for_token(question, values, self.reply, read_preference)
        return verdict.says, verdict.reason or _describe(tokens)


def read_preference(tokens: TopLogprobs) -> Verdict:
    """Returns a verdict with the share of the first label in the probability of both."""
    a, b = (_probability(tokens, label) for label in LABELS)
    if not a + b > 0:
        return Verdict(None, fault=f"it does not begin with {' or '.join(LABELS)}")
    words = (f"{label} {number(p, 3)}" for label, p in zip(LABELS, (a, b), strict=True))
    return Verdict(a / (a + b), reason=", ".join(words))


def _probability(tokens: TopLogprobs, label: str) -> float:
    # Rounding may give a logarithm above 0.
    return sum(math.exp(min(p, 0.0)) for text, p in tokens if text.strip().upper() == label)


def _describe(tokens: TopLogprobs) -> str:
    """Returns the most likely tokens with their probabilities."""
    likely = sorted(tokens, key=lambda token: -token[1])[:SHOWN]
    return ", ".join(f"{text!r} {number(math.exp(p), 3)}" for text, p in likely) or "no token"
