"""The one contract between row programs and whatever answers them: `await ask(messages)`."""

from dataclasses import dataclass
from typing import Any, Protocol

from zephyr_ray.errors import Permanent
from zephyr_ray.messages import Message


class StopRun(Permanent):
    """A failure that concerns every row (a bad key, an unknown model): the stage stops at once."""


class EngineDead(Exception):
    """The engine cannot go on; its process must be replaced."""


@dataclass(frozen=True)
class Reply:
    """One answer. `finish_reason` is "stop" (ended by itself) or "length" (cut off)."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn."""

    temperature: float
    top_p: float
    max_tokens: int


class Ask(Protocol):
    """What a row program gets: its row's model.

    Raises Permanent if this row cannot be answered, StopRun, or Temporary.
    """

    async def __call__(
        self, messages: list[Message], *, max_tokens: int, shown: bool = True
    ) -> Reply:
        """Asks once. `shown=False` leaves the model's demonstrations out, for questions that are
        not the row's task."""

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Judges answers by a form of `judges.FORMS`."""
