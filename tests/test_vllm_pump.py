"""Tests how answers of vLLM's steps reach the rows that wait for them, with steps played here."""

import asyncio
from types import SimpleNamespace
from typing import Any

from zephyr_ray.engines.vllm import VllmEngine


class Steps:
    """Finishes one request per step; the first step, just after its row was cancelled."""

    def __init__(self) -> None:
        self.rows: list[asyncio.Task[Any]] = []
        self.requests: list[str] = []

    def add_request(self, number: str, *_: Any) -> None:
        self.requests.append(number)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        number = self.requests.pop(0)
        if number == "0":
            self.rows[0].cancel()
        answer = SimpleNamespace(
            text=f"answer {number}", finish_reason="stop", token_ids=[1], logprobs=None
        )
        return [SimpleNamespace(request_id=number, outputs=[answer], finished=True)]

    def abort_request(self, numbers: list[str]) -> None:
        pass


def test_a_row_that_is_cancelled_as_its_answer_ends_does_not_end_the_engine() -> None:
    async def main() -> list[Any]:
        engine, steps = object.__new__(VllmEngine), Steps()
        engine.__dict__.update(_engine=steps, _waiting={}, _listeners={}, _pump=None)
        engine._numbers = iter(range(2))
        steps.rows = [asyncio.create_task(engine._sample([1], None, None)) for _ in range(2)]
        return await asyncio.gather(*steps.rows, return_exceptions=True)

    cancelled, reply = asyncio.run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert reply.text == "answer 1"
