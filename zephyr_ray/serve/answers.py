"""The models behind the gateway: a checked request goes to a replica, its answer comes back whole
or as events.

What a lost replica has not begun to answer is asked of another one. What it has begun ends with an
error event: asked again, it would show the client two beginnings.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zephyr_ray.serve.requests import ChatRequest, CompletionRequest, RequestError, Sampled, parse

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger("zephyr_ray.serve")

TRIES = 4
"""Replicas that are asked before a request fails."""
COMPLETION_TOKENS = 16
"""OpenAI's default of completions."""


@dataclass(frozen=True)
class Format:
    """How a model's conversations are written: what a user's text may not hold, and what ends an
    answer."""

    control_tokens: list[str]
    stop_token_id: int


@dataclass
class Answer:
    """Either `whole`, or `events` as text/event-stream."""

    model: str
    prompt: Any
    whole: dict[str, Any] | None = None
    events: AsyncIterator[str] | None = None


class Models:
    """Handles of `ray.serve.llm` servers by the name of their model."""

    def __init__(
        self,
        handles: "dict[str, DeploymentHandle]",
        formats: dict[str, Format],
        max_tokens: int,
    ):
        # It imports vLLM, for ten seconds and more, which no client should wait for.
        from ray.serve.llm import openai_api_models
        from ray.util.metrics import Histogram

        self._theirs = openai_api_models
        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._formats, self._max_tokens = formats, max_tokens
        self._first = Histogram(
            "zephyr_first_token_seconds",
            "Seconds to the first token, or to the whole answer where it is not streamed",
            [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
            ("model",),
        )

    @property
    def names(self) -> list[str]:
        return list(self._handles)

    def handle(self, name: str) -> Any:
        """The handle of a model; RequestError 404 where there is none."""
        if name not in self._handles:
            message = f"no model {name[:64]!r} here; there is {', '.join(self._handles)}"
            raise RequestError(404, message, "model_not_found", "model")
        return self._handles[name]

    async def chat(self, body: bytes, request_id: str) -> Answer:
        asked = parse(ChatRequest, body)
        self.handle(asked.model)
        form = self._formats[asked.model]
        messages = asked.plain(form.control_tokens)
        settings = self._settings(asked, asked.max_completion_tokens or asked.max_tokens)
        settings |= {"messages": messages, "stop_token_ids": [form.stop_token_id]}
        settings.pop("max_completion_tokens", None)
        return await self._answer(
            asked, "chat", self._theirs.ChatCompletionRequest, settings, request_id
        )

    async def complete(self, body: bytes, request_id: str) -> Answer:
        asked = parse(CompletionRequest, body)
        settings = self._settings(
            asked, asked.max_tokens or min(COMPLETION_TOKENS, self._max_tokens)
        )
        return await self._answer(
            asked, "completions", self._theirs.CompletionRequest, settings, request_id
        )

    def _settings(self, asked: Sampled, max_tokens: int | None) -> dict[str, Any]:
        """The client's settings for the engine."""
        most = self._max_tokens
        if max_tokens and max_tokens > most:
            raise RequestError(422, f"max_tokens: at most {most} here", "too_large", "max_tokens")
        if asked.stream_options and not asked.stream:
            message = "stream_options needs stream: true"
            raise RequestError(400, message, "invalid_value", "stream_options")
        settings = asked.model_dump(exclude_none=True, exclude={"user"})
        return settings | ({"max_tokens": max_tokens} if max_tokens else {})

    async def _answer(
        self, asked: Sampled, method: str, kind: Any, settings: dict[str, Any], request_id: str
    ) -> Answer:
        handle = self.handle(asked.model)
        try:
            theirs = kind(**settings, request_id=request_id)
        except ValueError as error:
            raise RequestError(422, _line(error), "invalid_value") from None
        began = time.monotonic()
        first, rest = await _begin(getattr(handle, method), theirs)
        self._first.observe(time.monotonic() - began, tags={"model": asked.model})
        prompt = settings.get("messages") or settings.get("prompt")
        if asked.stream:
            return Answer(asked.model, prompt, events=_events(first, rest))
        return Answer(asked.model, prompt, whole=first.model_dump(mode="json"))


async def _begin(method: Any, theirs: Any) -> tuple[Any, Any]:
    """The first thing the model says, from the first replica that lives to say it, and the rest."""
    import ray
    from ray.serve.exceptions import BackPressureError, RayServeException

    for attempt in range(TRIES):
        stream = method.remote(theirs, None)
        try:
            first = await anext(stream)
            if (fault := _fault(first)) is None:
                return first, stream
            if fault.status < 500:
                raise fault
            log.warning("a replica answers with an error: %s", fault)
        except BackPressureError:
            message = "all replicas are busy; try again"
            raise RequestError(429, message, "overloaded", retry_after=1) from None
        except (ray.exceptions.RayError, RayServeException) as error:
            # The actor, or the engine's own process behind it: another replica may live.
            log.warning("a replica was lost: %s", _line(error))
        except asyncio.CancelledError:
            stream.cancel()
            raise
        await asyncio.sleep(0.2 * 2**attempt)
    message = "the model's replicas were lost; try again"
    raise RequestError(503, message, "replica_lost", retry_after=1)


def _fault(first: Any) -> RequestError | None:
    """The error that the model's server gives in place of an answer, or of the first event."""
    told = first[0] if isinstance(first, list) else first
    if isinstance(told, str) and told.startswith('data: {"error"'):
        error = json.loads(told.removeprefix("data: "))["error"]
    elif getattr(told, "error", None) is not None:
        error = told.error.model_dump()
    else:
        return None
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 400
    return RequestError(status, str(error.get("message")), str(error.get("type")))


async def _events(first: Any, rest: Any) -> AsyncIterator[str]:
    """Server-sent events, as the model's server writes them."""
    import ray

    try:
        yield _text(first)
        async for chunk in rest:
            yield _text(chunk)
    except (ray.exceptions.RayError, ValueError) as error:
        log.warning("a stream broke off: %s", _line(error))
        lost = RequestError(503, "the answer broke off; ask again", "replica_lost")
        yield f"data: {json.dumps(lost.body())}\n\n"
    finally:
        # A client that hung up frees its place; after the end this does nothing.
        rest.cancel()


def _text(chunk: Any) -> str:
    parts = chunk if isinstance(chunk, list) else [chunk]
    return "".join(
        part if isinstance(part, str) else f"data: {part.model_dump_json()}\n\n" for part in parts
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
