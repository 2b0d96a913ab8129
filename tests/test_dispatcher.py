"""Tests the dispatcher against methods of a model's server that refuse, fail or are lost."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from zephyr_ray.serve import dispatcher
from zephyr_ray.serve.request_error import RequestError


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


class Method:
    """A method that streams the given chunks. An exception among them is raised in a RayTaskError,
    as Ray does, or unwrapped, as Serve does over gRPC."""

    by_grpc = False

    def __init__(self, *chunks: Any):
        self.chunks, self.attempts = chunks, 0

    def remote(self, request: Any, http: None) -> "Method":
        self.attempts += 1
        self._rest = iter(self.chunks)
        return self

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        chunk = next(self._rest, StopAsyncIteration())
        if isinstance(chunk, StopAsyncIteration):
            raise chunk
        if isinstance(chunk, Exception):
            if self.by_grpc:
                raise chunk
            raise RayTaskError("chat", f"Traceback: {chunk!r} in /app/engine.py", chunk)
        return chunk

    def cancel(self) -> None:
        pass


@pytest.fixture(params=[False, True], ids=["as Ray", "as gRPC"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "by_grpc", request.param)


def vllm_error(name: str, *args: str, **kwargs: str) -> Exception:
    """Returns an exception of vLLM; importing vLLM here keeps test collection fast."""
    from vllm import exceptions

    error: Exception = getattr(exceptions, name)(*args, **kwargs)
    return error


def error_chunk(message: str, code: int) -> Any:
    """Returns the error that a model's server sends instead of an answer."""
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    return ErrorResponse(error=ErrorInfo(message=message, type="BadRequestError", code=code))


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    "chunk",
    [
        lambda: vllm_error("VLLMValidationError", "n must be 1.", parameter="n", value="2"),
        lambda: ValueError("n must be 1."),
        lambda: error_chunk("n must be 1. (parameter=n, value=2)", 400),
        lambda: ['data: {"error": {"message": "n must be 1.", "code": 400}}'],
    ],
)
def test_a_refusal_of_the_engine_is_passed_on_without_a_retry(
    chunk: Callable[[], Any],
) -> None:
    method = Method(chunk())
    with pytest.raises(RequestError) as caught:
        asyncio.run(dispatcher._first_chunk(method, {}, "dpo"))
    assert (caught.value.status, str(caught.value), method.attempts) == (400, "n must be 1.", 1)
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.usefixtures("transport")
def test_a_long_value_in_a_refusal_does_not_take_long_to_read() -> None:
    message = "n must be 1." + " (value=" * 150_000
    method = Method([f'data: {{"error": {{"message": "{message}", "code": 400}}}}'])
    start = time.process_time()
    with pytest.raises(RequestError) as caught:
        asyncio.run(dispatcher._first_chunk(method, {}, "dpo"))
    # Imports take about a second; a pattern that read to the end at every field, minutes.
    assert message.startswith(str(caught.value)) and time.process_time() - start < 15


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    "chunk",
    [
        lambda: vllm_error("GenerationError", "a secret"),
        lambda: KeyError("a secret"),
        lambda: error_chunk("a secret", 500),
    ],
)
def test_a_failure_of_the_engine_is_retried_and_not_shown(
    chunk: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(seconds: float) -> None:
        pass

    monkeypatch.setattr(dispatcher.asyncio, "sleep", sleep)
    method = Method(chunk())
    with pytest.raises(RequestError) as caught:
        asyncio.run(dispatcher._first_chunk(method, {}, "dpo"))
    assert (caught.value.status, method.attempts) == (503, 4)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (['data: {"error": {"message": "too long", "code": 400}}\n\n'], "too long"),
        (
            ['data: {"error": {"message": "a secret", "code": 500}}\n\n'],
            "the answer was interrupted",
        ),
        (KeyError("a secret"), "the answer was interrupted"),
    ],
)
def test_a_stream_that_fails_ends_with_an_error_of_openais_shape(chunk: Any, message: str) -> None:
    rest = Method(chunk).remote({}, None)

    async def events() -> list[str]:
        return [event async for event in dispatcher._events(["data: 1\n\n"], rest)]

    first, last = asyncio.run(events())
    error = json.loads(last.removeprefix("data: "))["error"]
    assert first == "data: 1\n\n" and message in error["message"]
    assert error.keys() == {"message", "type", "param", "code"} and isinstance(error["code"], str)


def test_a_refusal_while_the_engines_request_is_built_names_its_field() -> None:
    def build(**_: Any) -> None:
        raise vllm_error("VLLMValidationError", "needs logprobs", parameter="top_logprobs")

    served = SimpleNamespace(handle=lambda name: None)
    request = SimpleNamespace(model="dpo")
    with pytest.raises(RequestError, match="^needs logprobs$") as caught:
        asyncio.run(dispatcher.Dispatcher._respond(served, request, "chat", build, {}, "r"))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.param) == (400, "top_logprobs")
