"""Tests the dispatcher's retries against a method that fails as a lost replica does."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from zephyr_ray.serve import dispatcher
from zephyr_ray.serve.requests import RequestError


class LostReplica:
    """A deployment's method whose replica is always lost."""

    attempts = 0

    async def remote(self, request: Any, http: None) -> Any:
        self.attempts += 1
        raise RayActorError
        yield


def test_a_request_fails_after_its_last_attempt_without_another_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(dispatcher.asyncio, "sleep", sleep)
    method = LostReplica()
    with pytest.raises(RequestError, match="model 'dpo': 4 attempts failed; try again") as caught:
        asyncio.run(dispatcher._first_chunk(method, {}, "dpo"))
    assert (method.attempts, waits) == (4, [0.2, 0.4, 0.8])
    assert (caught.value.status, caught.value.code) == (503, "replica_lost")
