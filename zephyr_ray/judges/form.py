"""The form of a judgement: what is asked, and how the words of the reply are read."""

from typing import Any, ClassVar, Protocol

from zephyr_ray.demand import Calls
from zephyr_ray.models.contract import Ask

Row = dict[str, Any]
"""The prompt that was answered: `prompt`, `instruction` and `constraint` (or None)."""
Answer = dict[str, Any]
"""A judged answer: `text` and `finish_reason`."""
Judgement = dict[str, Any]

QUESTION_TOKENS = 128
"""Tokens of a form's own words, for estimates."""


class Form(Protocol):
    """One way to judge answers. A form needs only `ask`, so any language model can fill it."""

    name: ClassVar[str]
    """The name in stages, and of the route that serves it: `/judge/<name>`."""
    fields: ClassVar[tuple[str, ...]]
    """Names of the judged answers in a request to that route."""

    async def judge(self, row: Row, answers: list[Answer], ask: Ask) -> Judgement:
        """Judges one answer per entry of `fields`. A reply that cannot be read is counted as
        unparsable in the judgement; it is never a score or a verdict."""

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        """Returns the calls and tokens of so many judgements, by tokens of a prompt and an
        answer."""
