"""Runs coroutines on a simulated clock, where waits take no time; reserves and settles single
requests with a governor."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from zephyr_ray.engines.governor import Governor, Settlement
from zephyr_ray.engines.tariff import Usage


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0]._when)
        super()._run_once()


def simulate(main: Coroutine[Any, Any, Any]) -> Any:
    """Runs the coroutine on a simulated clock and returns its result."""
    loop = _Loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


async def reserve_one(governor: Governor, model: str, max_usage: Usage) -> Any:
    [ticket] = await governor.reserve("s", model, [max_usage])
    return ticket


async def settle_one(governor: Governor, ticket: str, end: Settlement) -> None:
    await governor.settle([(ticket, end)])
