"""Groups the calls of many tasks: while one call runs, others wait and become the next one."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

MOST_ITEMS = 1000
"""Maximum items per call."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Grouped(Generic[Item, Result]):
    """Collects single items into lists and calls a function with each list, in one event loop.

    The function returns the results of the list, or of its first items; the others are then part of
    the next call. Its error is the error of every item of the call.
    """

    def __init__(
        self,
        call: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        drop: Callable[[Result], None] = lambda result: None,
    ):
        """`drop` gets the results of items that nothing waits for any more."""
        self._call, self._drop = call, drop
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._sender: asyncio.Task[None] | None = None

    def put(self, item: Item) -> "asyncio.Future[Result]":
        """Returns the future of an item's result."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        return future

    async def _send(self) -> None:
        while self._drop_cancelled():
            group = [item for item, _ in islice(self._waiting, MOST_ITEMS)]
            results: Sequence[Any]
            try:
                results = await self._call(group)
            except Exception as error:
                results = [error] * len(group)
            for result in results:
                _, future = self._waiting.popleft()
                if isinstance(result, Exception):
                    if not future.done():
                        future.set_exception(result)
                elif future.done():  # cancelled
                    self._drop(result)
                else:
                    future.set_result(result)

    def _drop_cancelled(self) -> bool:
        """Drops the first items if nothing waits for them any more; returns whether one is left.
        So, once a stage has stopped and all its items are cancelled, no call is made."""
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()
        return bool(self._waiting)
