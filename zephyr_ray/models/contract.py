"""Defines the contract between row programs and the models that answer them: `await
ask(messages)`."""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.messages import Message

STOPPING: ContextVar[asyncio.Event | None] = ContextVar("STOPPING", default=None)
"""An event that is set once the stage of the row in this context stops; then no request is sent or
retried."""
REQUESTS: ContextVar[asyncio.Semaphore | None] = ContextVar("REQUESTS", default=None)
"""Limits the requests in flight in the pass over rows that this context belongs to."""
STOPPED = "the stage stopped before the request was sent"


def check_stopping() -> None:
    """Raises Temporary if the stage of the row in this context is stopping."""
    if (stopping := STOPPING.get()) and stopping.is_set():
        raise Temporary(STOPPED)


async def begin_waiting_requests() -> None:
    """Waits until requests that waited for a slot have begun. In the first iteration of the event
    loop, rows that got a reply free their slots; in the second, waiting requests take them."""
    for _ in range(2):
        await asyncio.sleep(0)


class StopRun(Permanent):
    """An error that every row would have: a wrong key, an unknown model, spent credits."""


class EngineDead(Exception):
    """A crash of the engine; its process must be replaced."""


TopLogprobs = tuple[tuple[str, float], ...]
"""Texts of tokens that may begin an answer, with the natural logarithms of their probabilities."""


@dataclass(frozen=True)
class Reply:
    """One answer of a model."""

    text: str
    finish_reason: str
    """"stop" if the model ended the answer, "length" if it was cut off at the token limit."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    top_logprobs: TopLogprobs = ()
    """The most likely first tokens, if the request asked for them."""


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of one answer."""

    temperature: float
    top_p: float
    max_tokens: int
    """Maximum tokens of the answer."""
    schema: dict[str, Any] | None = None
    """JSON schema of the answer, for engines that can enforce it; None for any text."""
    top_logprobs: int | None = None
    """Number of most likely first tokens to return with the answer; None for none."""


class Ask(Protocol):
    """The model of one row, as passed to its row program.

    Raises RowError if this row is at fault, StopRun if no row can be answered, and Temporary if
    the next run should ask again.
    """

    async def __call__(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        with_demonstrations: bool = True,
        schema: dict[str, Any] | None = None,
        temperature: float | None = None,
        top_logprobs: int = 0,
    ) -> Reply:
        """Returns the answer to a conversation. `with_demonstrations=False` omits the model's
        demonstrations, for questions other than the row's task. `schema` is the JSON schema that
        the answer should follow; engines that cannot enforce it ignore it. `temperature` replaces
        the model's own. `top_logprobs` asks for the log-probabilities of that many first tokens;
        the answer is then sampled at temperature 1 and top-p 1, at which all engines return the
        probabilities of the model itself."""

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Returns the judgement of answers by a form of `judges.FORMS`."""
