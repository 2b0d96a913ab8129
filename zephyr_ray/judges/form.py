"""Defines a judge form: the questions to the judge, and how its replies are parsed."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from zephyr_ray.demand import Calls
from zephyr_ray.errors import RowError
from zephyr_ray.formatting import shorten
from zephyr_ray.judges.inquiry import Inquiry
from zephyr_ray.judges.question import Question

Row = dict[str, Any]
"""The answered prompt: `prompt`, `instruction` and `constraint` (or None)."""
Answer = dict[str, Any]
"""A judged answer: `text` and `finish_reason`."""
Judgement = dict[str, Any]

QUESTION_TOKENS = 128
"""Tokens of a form's instructions to the judge, for estimates."""


def unreadable(judgement: Judgement) -> RowError | None:
    """Returns the fault of a judgement with a reply that cannot be parsed; None if all could be."""
    if "unparsable" in judgement:
        texts = judgement["unparsable"]
        return RowError(shorten("; ".join(texts)), "unparsable") if texts else None
    if judgement.get("score", judgement.get("verdict")) is not None:
        return None
    return RowError(shorten(judgement["reason"]), "unparsable")


class Form(Protocol):
    """One way to judge answers. It needs only questions and replies, so any language model can be
    the judge."""

    name: ClassVar[str]
    """Name in stages and in the route that serves it, `/judge/<name>`."""
    fields: ClassVar[tuple[str, ...] | None]
    """Names of the judged answers in a request to that route; None if the form judges any number of
    answers together, which a request then lists in `completions`."""
    questions: ClassVar[tuple[Question, ...]]
    """Questions of the form, whose wording a recipe can replace."""

    async def judge(self, row: Row, answers: list[Answer], inquiry: Inquiry) -> Judgement:
        """Judges the answers, one per entry of `fields`. If a reply cannot be parsed, the score or
        verdict in the judgement is None, or its text is in `unparsable`."""

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        """Returns the calls and tokens of `judgements` judgements, without second calls for replies
        that cannot be parsed; `prompt` and `answer` are tokens per prompt and per answer."""


@runtime_checkable
class LogprobForm(Form, Protocol):
    """A form that reads log-probabilities, which not every engine gives."""

    top_logprobs: ClassVar[int]
    """Number of most likely tokens that it reads."""


@dataclass(frozen=True)
class Rating:
    """One rating of one answer."""

    value: float | None
    """None if it does not apply."""
    position: int | None = None
    """Place of the answer, from 1, among those that were judged together."""


@runtime_checkable
class RatingForm(Form, Protocol):
    """A form that rates each answer, for feedback."""

    rates: ClassVar[tuple[str, ...]]
    """Names of its ratings."""
    highest: ClassVar[int]
    """The best score; the worst is 1."""

    def calls(self, judgements: float, prompt: int, answer: int, answers: float = 1) -> Calls:
        """Returns the same calls and tokens, for judgements of `answers` answers each."""

    def ratings(self, judgement: Judgement) -> list[dict[str, Rating]]:
        """Returns the ratings by name, per answer; those that cannot be parsed are omitted."""

    def columns(self, judgement: Judgement) -> list[dict[str, Any]]:
        """Returns the columns of each answer in an artifact of feedback: `score`, `reason`,
        `checks`, and the form's own."""

    def words(self, columns: dict[str, Any]) -> list[str]:
        """Returns what the judge wrote about an answer, from its columns, for the report."""
