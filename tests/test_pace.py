"""Tests rate limits on a simulated clock: used fully, never exceeded, and lowered after a 429."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from simulated import reserve_one, settle_one, simulate

from zephyr_ray.engines.governor import Governor, Settlement
from zephyr_ray.engines.tariff import Tariff, Usage

ACTORS = 16


class Server:
    """An endpoint that records the arrival time and tokens of each request, and allows at most
    `per_minute` requests, evenly spread; others get 429."""

    def __init__(self, governor: Governor, per_minute: float = 1e9, after: float | None = None):
        self.governor, self._rng = governor, random.Random(0)
        self._seconds, self._after, self._next = 60 / per_minute, after, 0.0
        self.arrivals: list[tuple[float, int]] = []
        self.refused: list[float] = []

    async def one(self, most: Usage, model: str = "m") -> None:
        loop = asyncio.get_running_loop()
        ticket = await reserve_one(self.governor, model, most)
        await asyncio.sleep(self._rng.uniform(0, 0.3))  # on its way
        now = loop.time()
        if now < self._next - 1:
            self.refused.append(now)
            await settle_one(self.governor, ticket, Settlement(Usage(), True, self._after))
            return
        self._next = max(now, self._next) + self._seconds
        usage = Usage(
            int(most.input * self._rng.uniform(0.1, 0.4)), self._rng.randint(1, most.output)
        )
        self.arrivals.append((now, usage.tokens))
        await asyncio.sleep(self._rng.uniform(0.5, 5))
        await settle_one(self.governor, ticket, Settlement(usage))


def serve(
    folder: Path, tariffs: dict[str, Tariff], minutes: float, width: int = 100, **server: Any
) -> Server:
    """Keeps `width` requests of each model waiting or in flight for some minutes."""

    async def main() -> Server:
        running = Server(Governor(folder, "run", tariffs), **server)
        rng = random.Random(1)

        async def work(model: str) -> None:
            while True:
                await running.one(Usage(rng.randint(400, 2000), 300), model)

        workers = [asyncio.ensure_future(work(m)) for m in tariffs for _ in range(width)]
        await asyncio.sleep(60 * minutes)
        for worker in workers:
            worker.cancel()
        return running

    result: Server = simulate(main())
    return result


def most_per_minute(arrivals: list[tuple[float, int]], tokens: bool) -> float:
    """Returns the most requests, or tokens, in any 60 seconds."""
    most, start, total = 0, 0, 0
    for at, used in arrivals:
        total += used if tokens else 1
        while arrivals[start][0] <= at - 60:
            total -= arrivals[start][1] if tokens else 1
            start += 1
        most = max(most, total)
    return most


@pytest.mark.parametrize("limit", [3, 60, 3000])
def test_a_request_limit_is_used_fully_and_not_exceeded(limit: int, tmp_path: Path) -> None:
    minutes = 20 if limit < 1000 else 4
    running = serve(tmp_path, {"m": Tariff("a", requests_per_minute=limit)}, minutes, 300)
    assert len(running.arrivals) >= 0.97 * limit * minutes - 1
    assert most_per_minute(running.arrivals, tokens=False) <= limit


def test_a_token_limit_is_used_fully_and_not_exceeded(tmp_path: Path) -> None:
    """The first minute, while the tokens per request are being learned, may use less."""
    limit, minutes = 200_000, 10
    running = serve(tmp_path, {"m": Tariff("a", tokens_per_minute=limit)}, 1 + minutes)
    after = sum(tokens for at, tokens in running.arrivals if at >= 60)
    assert after >= 0.97 * limit * minutes
    assert most_per_minute(running.arrivals, tokens=True) <= limit


def test_models_of_one_account_share_its_limit(tmp_path: Path) -> None:
    tariffs = {"m": Tariff("a", 600), "n": Tariff("a", 900), "other": Tariff("b", 60)}
    running = serve(tmp_path, tariffs, 3)
    assert 0.97 * 660 * 3 - 2 <= len(running.arrivals) <= 660 * 3


@pytest.mark.parametrize("after", [None, 2.0])
def test_a_server_with_a_lower_limit_refuses_few_requests(
    after: float | None, tmp_path: Path
) -> None:
    """The recipe says 1200 per minute; the server allows 600."""
    tariffs = {"m": Tariff("a", requests_per_minute=1200)}
    running = serve(tmp_path, tariffs, 20, 300, per_minute=600, after=after)
    assert sum(at > 60 for at in running.refused) < 0.02 * len(running.arrivals)
    assert sum(at > 60 for at, _ in running.arrivals) > 0.75 * 600 * 19


def test_no_request_is_sent_before_the_time_that_a_server_states(tmp_path: Path) -> None:
    async def main() -> float:
        governor = Governor(tmp_path, "run", {"m": Tariff("a", 6000), "n": Tariff("b", 6000)})
        first, _ = [await reserve_one(governor, "m", Usage(1, 1)) for _ in range(2)]
        await settle_one(governor, str(first), Settlement(Usage(), limited=True, after=30))
        await reserve_one(governor, "n", Usage(1, 1))
        assert asyncio.get_running_loop().time() < 1
        await reserve_one(governor, "m", Usage(1, 1))
        return asyncio.get_running_loop().time()

    assert 30 <= simulate(main()) < 30.2


def test_rate_limits_of_requests_in_flight_together_lower_the_pace_once(tmp_path: Path) -> None:
    """At 0.8 × 100 per second, 200 requests take about 2.5 s, not the 40 s of the minimum pace."""

    async def main() -> float:
        governor = Governor(tmp_path, "run", {"m": Tariff("a", 6000)})
        tickets = [await reserve_one(governor, "m", Usage(1, 1)) for _ in range(20)]
        limited = Settlement(Usage(), limited=True)
        await governor.settle([(str(ticket), limited) for ticket in tickets])
        start = asyncio.get_running_loop().time()
        for _ in range(200):
            await reserve_one(governor, "m", Usage(1, 1))
        return asyncio.get_running_loop().time() - start

    assert 2.2 < simulate(main()) < 2.8


@pytest.mark.parametrize("after", [86400.0, float("inf")])
def test_a_very_long_pause_that_a_server_states_does_not_delay_the_rows(
    after: float, tmp_path: Path
) -> None:
    """Their requests get the rate limit too, so the stage stops with that reason."""

    async def main() -> float:
        governor = Governor(tmp_path, "run", {"m": Tariff("a", 6000)})
        first = await reserve_one(governor, "m", Usage(1, 1))
        await settle_one(governor, str(first), Settlement(Usage(), limited=True, after=after))
        await asyncio.wait_for(reserve_one(governor, "m", Usage(1, 1)), 1000)
        return asyncio.get_running_loop().time()

    assert simulate(main()) < 1


def test_a_request_of_more_tokens_than_the_limit_is_sent_alone(tmp_path: Path) -> None:
    async def main() -> list[float]:
        governor = Governor(tmp_path, "run", {"m": Tariff("a", tokens_per_minute=100)})
        times = []
        for _ in range(2):
            ticket = await reserve_one(governor, "m", Usage(200, 100))
            times.append(asyncio.get_running_loop().time())
            await settle_one(governor, str(ticket), Settlement(Usage(150, 50)))
        return times

    first, second = simulate(main())
    assert first == 0 and second >= 60
