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
"""Seconds that a request waits for identical ones. Rows of one prompt start together, and again
after a common answer."""
MOST_CHOICES = 8
"""Maximum choices per request; no endpoint that takes several takes fewer."""

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
    """Rows that wait for one request."""

    keys: list[str] = field(default_factory=list)
    rows: list[asyncio.Future[Outcome | None]] = field(default_factory=list)


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
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, messages: list[Message], sampling: Sampling, key: str) -> Reply:
        """Returns one row's answer. Raises as `Ask` does."""
        outcome = await self._join(messages, sampling, key) if self._most > 1 else None
        if outcome is None or isinstance(outcome, Unavailable):
            [outcome] = await self._request(messages, sampling, [key])
        if not isinstance(outcome, Reply):
            raise outcome
        return outcome

    async def _join(self, messages: list[Message], sampling: Sampling, key: str) -> Outcome | None:
        """Returns a row's choice; None if the reply has too few."""
        # Models with different prices may share the engine.
        request = json.dumps([messages, vars(sampling), getattr(METER.get(), "model", None)])
        group = self._groups.get(request)
        if group is None or len(group.rows) >= self._most:
            group = self._groups[request] = _Group()
            task = asyncio.create_task(self._send(request, group, messages, sampling))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        group.keys.append(key)
        group.rows.append(row := asyncio.get_running_loop().create_future())
        return await row

    async def _send(
        self, request: str, group: _Group, messages: list[Message], sampling: Sampling
    ) -> None:
        await asyncio.sleep(JOIN_SECONDS)
        if self._groups.get(request) is group:
            del self._groups[request]
        try:
            outcomes = await self._request(messages, sampling, group.keys)
        except Exception as error:
            for row in group.rows:
                if not row.done():  # else it was cancelled
                    row.set_exception(error)
            return
        if len(outcomes) < len(group.rows):
            self._most = min(self._most, len(outcomes))
        for number, row in enumerate(group.rows):
            if not row.done():
                row.set_result(outcomes[number] if number < len(outcomes) else None)
