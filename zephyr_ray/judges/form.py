"""Defines a judge form: the question to the judge, and how its reply is parsed."""

from typing import Any, ClassVar, Protocol

from zephyr_ray.demand import Calls
from zephyr_ray.errors import RowError
from zephyr_ray.formatting import shorten
from zephyr_ray.models.contract import Ask

Row = dict[str, Any]
"""The answered prompt: `prompt`, `instruction` and `constraint` (or None)."""
Answer = dict[str, Any]
"""A judged answer: `text` and `finish_reason`."""
Judgement = dict[str, Any]

QUESTION_TOKENS = 128
"""Tokens of a form's instructions to the judge, for estimates."""


def unreadable(judgement: Judgement) -> RowError | None:
    """Returns the fault of a judgement without a score or verdict; None if it has one."""
    if judgement.get("score", judgement.get("verdict")) is not None:
        return None
    return RowError(shorten(judgement["reason"]), "unparsable")


class Form(Protocol):
    """One way to judge answers. It needs only `ask`, so any language model can be the judge."""

    name: ClassVar[str]
    """Name in stages and in the route that serves it, `/judge/<name>`."""
    fields: ClassVar[tuple[str, ...]]
    """Names of the judged answers in a request to that route."""

    async def judge(self, row: Row, answers: list[Answer], ask: Ask) -> Judgement:
        """Judges the answers, one per entry of `fields`. If the reply cannot be parsed, the score
        or verdict in the judgement is None."""

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        """Returns the calls and tokens of `judgements` judgements; `prompt` and `answer` are
        tokens per prompt and per answer."""
