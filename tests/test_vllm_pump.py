"""Tests how answers from vLLM's steps reach the rows that wait for them, with a fake engine."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from zephyr_ray.engines.vllm import VllmEngine
from zephyr_ray.errors import Temporary
from zephyr_ray.models.contract import REQUESTS, STOPPING


class Steps:
    """Finishes one request per step; cancels the row of the first just before its answer."""

    def __init__(self) -> None:
        self.rows: list[asyncio.Task[Any]] = []
        self.requests: list[str] = []

    def add_request(self, number: str, *_: Any) -> None:
        self.requests.append(number)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        number = self.requests.pop(0)
        if number == "1" and self.rows:
            self.rows[0].cancel()
        answer = SimpleNamespace(
            text=f"answer {number}", finish_reason="stop", token_ids=[1], logprobs=None
        )
        return [SimpleNamespace(request_id=number, outputs=[answer], finished=True)]

    def abort_request(self, numbers: list[str]) -> None:
        pass


class Batches(Steps):
    """Finishes the oldest two requests per step, and records how many were in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def step(self) -> list[Any]:
        self.sizes.append(len(self.requests))
        return [Steps.step(self)[0] for _ in range(min(2, len(self.requests)))]


def engine_of(steps: Steps) -> VllmEngine:
    """Returns an engine that runs these steps instead of vLLM's."""
    engine = object.__new__(VllmEngine)
    engine.__dict__.update(_engine=steps, _waiting={}, _listeners={}, _pump=None)
    engine._numbers = itertools.count(1)
    return engine


def test_slots_limit_the_requests_and_are_full_at_every_step() -> None:
    async def main() -> list[int]:
        engine = engine_of(steps := Batches())
        REQUESTS.set(asyncio.Semaphore(3))

        async def row() -> None:
            for _ in range(2):
                await engine._sample([1], None, None)

        await asyncio.gather(*(row() for _ in range(6)))
        return steps.sizes

    assert asyncio.run(main()) == [3, 3, 3, 3, 3, 2]


def test_no_request_enters_the_engine_once_the_stage_stops() -> None:
    async def main() -> list[str]:
        engine = engine_of(steps := Batches())
        STOPPING.set(stopping := asyncio.Event())
        stopping.set()
        with pytest.raises(Temporary, match="the stage stopped before the request was sent"):
            await engine._sample([1], None, None)
        return steps.requests

    assert asyncio.run(main()) == []


def test_a_row_that_is_cancelled_as_its_answer_ends_does_not_end_the_engine() -> None:
    async def main() -> list[Any]:
        steps = Steps()
        engine = engine_of(steps)
        steps.rows = [asyncio.create_task(engine._sample([1], None, None)) for _ in range(2)]
        return await asyncio.gather(*steps.rows, return_exceptions=True)

    cancelled, reply = asyncio.run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert reply.text == "answer 2"
