"""Joins identical requests of several rows into one request with several choices."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from zephyr_ray.engines.meter import METER
from zephyr_ray.engines.replies import Unavailable, read_answer
from zephyr_ray.errors import RowError
from zephyr_ray.messages import Message
from zephyr_ray.models.contract import Reply, Sampling

JOIN_SECONDS = 0.005
"""Seconds that a request waits for identical ones. Rows of one prompt send their first requests at
the same time, and again after an answer that they share."""
MOST_CHOICES = 8
"""Maximum choices per request; endpoints that accept several accept at least this many."""

Outcome = Reply | RowError | Unavailable
"""The answer of a choice, or the error of a choice without an answer."""


def read_choices(data: dict[str, Any], where: str, count: int) -> list[Outcome]:
    """Returns up to `count` choices of a chat completion, which share its usage. Raises Unavailable
    if no choice can be used, and as `replies.read_answer` does if there is at most one."""
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        return [read_answer(data, where)]
    outcomes: list[Outcome] = []
    for choice in choices:
        try:
            outcomes.append(read_answer(data | {"choices": [choice]}, where))
        except (RowError, Unavailable) as error:
            outcomes.append(error)
    if all(isinstance(outcome, Unavailable) for outcome in outcomes):
        raise outcomes[0]  # type: ignore[misc]
    if count == 1:
        outcomes = [outcome for outcome in outcomes if not isinstance(outcome, Unavailable)]
    return share_usage(outcomes[:count])


def share_usage(outcomes: list[Outcome]) -> list[Outcome]:
    """Divides the usage of the request, which every reply states, among the replies: prompt tokens
    equally, answer tokens by length. The sum stays the same."""
    replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    if not replies:
        return outcomes
    total = replies[0]
    prompts = _divide(total.prompt_tokens, [1] * len(replies))
    answers = _divide(total.completion_tokens, [1 + len(reply.text) for reply in replies])
    shared = (
        replace(reply, prompt_tokens=prompt, completion_tokens=answer)
        for reply, prompt, answer in zip(replies, prompts, answers, strict=True)
    )
    return [next(shared) if isinstance(outcome, Reply) else outcome for outcome in outcomes]


def _divide(total: int, weights: list[int]) -> list[int]:
    """Divides a whole number by weights into whole numbers with the same sum."""
    sums = [0, *accumulate(weights)]
    return [total * end // sums[-1] - total * start // sums[-1] for start, end in pairwise(sums)]


@dataclass
class _Group:
    """Rows that wait for one request, which the first of them sends."""

    keys: list[str]
    others: list[asyncio.Future[Outcome | None]] = field(default_factory=list)
    """The choices of all rows but the first."""

    def share(self, outcomes: list[Outcome]) -> None:
        """Gives the others the choices after the first, None where there is none."""
        for number, other in enumerate(self.others, start=1):
            if not other.done():  # else it was cancelled
                other.set_result(outcomes[number] if number < len(outcomes) else None)

    def fail(self, error: Exception) -> None:
        for other in self.others:
            if not other.done():
                other.set_exception(error)


class JoinedRequests:
    """Sends the requests of rows; identical ones that arrive together become one request."""

    def __init__(
        self, request: Callable[[list[Message], Sampling, list[str]], Awaitable[list[Outcome]]]
    ):
        """`request` sends one request for several rows, given their keys, and returns its choices,
        of which there may be fewer than rows."""
        self._request = request
        self._most = MOST_CHOICES
        self._groups: dict[str, _Group] = {}
        """Groups not sent yet, by request."""

    async def answer(self, messages: list[Message], sampling: Sampling, key: str) -> Reply:
        """Returns one row's answer. Raises as `Ask` does."""
        outcome = await self._join(messages, sampling, key) if self._most > 1 else None
        if outcome is None or isinstance(outcome, Unavailable):
            [outcome] = await self._request(messages, sampling, [key])
        if not isinstance(outcome, Reply):
            raise outcome
        return outcome

    async def _join(self, messages: list[Message], sampling: Sampling, key: str) -> Outcome | None:
        """Returns a row's choice; None if there is none for it."""
        # Models with different prices may share the engine.
        request = json.dumps([messages, vars(sampling), getattr(METER.get(), "model", None)])
        group = self._groups.get(request)
        if group is None or len(group.keys) >= self._most:
            group = self._groups[request] = _Group([key])
            return await self._send(request, group, messages, sampling)
        group.keys.append(key)
        group.others.append(choice := asyncio.get_running_loop().create_future())
        return await choice

    async def _send(
        self, request: str, group: _Group, messages: list[Message], sampling: Sampling
    ) -> Outcome | None:
        """Sends the request of a group in the task of its first row, because another task would
        wait for more turns of the event loop; returns that row's choice."""
        try:
            try:
                await asyncio.sleep(JOIN_SECONDS)
            finally:
                if self._groups.get(request) is group:
                    del self._groups[request]
            outcomes = await self._request(messages, sampling, group.keys)
        except asyncio.CancelledError:
            group.share([])
            raise
        except Exception as error:
            group.fail(error)
            raise
        if len(outcomes) < len(group.keys):
            self._most = min(self._most, len(outcomes))
        group.share(outcomes)
        return outcomes[0] if outcomes else None
