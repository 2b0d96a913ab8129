"""The one contract between row programs and whatever answers them: `await ask(messages)`."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from zephyr_ray.errors import Permanent

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`"""


class StopRun(Permanent):
    """What is wrong concerns every row (a bad key, an unknown model): stop the stage at once."""


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


@runtime_checkable
class Engine(Protocol):
    """A started model. Raises Permanent (this row cannot be answered), StopRun, or Temporary."""

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply: ...


class Ask(Protocol):
    """What a row program gets: ask this row's model once.

    `shown=False` leaves the model's demonstrations out, for questions that are not the row's task.
    """

    async def __call__(
        self, messages: list[Message], *, max_tokens: int, shown: bool = True
    ) -> Reply: ...


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def demonstration_messages(rows: list[dict[str, Any]], kind: str | None) -> list[Message]:
    """Worked examples of one kind of constraint as earlier turns of the conversation."""
    messages: list[Message] = []
    for row in rows:
        if row["constraint"]["kind"] == kind:
            messages += [user(row["prompt"]), assistant(row["answer"])]
    return messages
