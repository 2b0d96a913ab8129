"""Sends each request to a replica of its model, and returns the response complete or as server-sent
events.

If a replica is lost before its response begins, another attempt follows. Once a response has begun,
it ends with an error event instead: a retry would repeat what the client already has.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import RowError
from zephyr_ray.serve.requests import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    SampledRequest,
    parse,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger("zephyr_ray.serve")

MAX_ATTEMPTS = 4
"""Maximum attempts per request."""
DEFAULT_COMPLETION_TOKENS = 16
"""Maximum tokens of a plain completion if the client sets none, as in OpenAI's API."""


def load_chat(folder: Path) -> ChatFormat:
    """Loads the chat format of a model that answers."""
    from transformers import AutoTokenizer

    return ChatFormat.to_ask(AutoTokenizer.from_pretrained(folder))


@dataclass
class ModelResponse:
    """Either a complete `body` or a stream of server-sent `events`."""

    model: str
    prompt: Any
    body: dict[str, Any] | None = None
    events: AsyncIterator[str] | None = None


class Dispatcher:
    """Sends requests to `ray.serve.llm` deployments, one per model name."""

    def __init__(
        self,
        handles: "dict[str, DeploymentHandle]",
        chat_formats: dict[str, ChatFormat],
        max_tokens: int,
    ):
        # Imports vLLM now (ten seconds), so that no request waits for it.
        from ray.serve.llm import openai_api_models
        from ray.util.metrics import Histogram

        self._protocol = openai_api_models
        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._chat_formats, self._max_tokens = chat_formats, max_tokens
        self._first_token_seconds = Histogram(
            "zephyr_first_token_seconds",
            "Seconds to the first token, or to the complete answer if it is not streamed",
            [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
            ("model",),
        )

    @property
    def names(self) -> list[str]:
        return list(self._handles)

    def handle(self, name: str) -> Any:
        """Returns a model's handle. Raises RequestError 404 if there is no such model."""
        if name not in self._handles:
            message = f"model {name[:64]!r} not found; use one of {', '.join(self._handles)}"
            raise RequestError(404, message, "model_not_found", "model")
        return self._handles[name]

    async def chat(self, body: bytes, request_id: str) -> ModelResponse:
        request = parse(ChatRequest, body)
        self.handle(request.model)
        chat, messages = self._chat_formats[request.model], request.plain_messages()
        settings = self._settings(request, request.max_completion_tokens or request.max_tokens)
        try:
            prompt = await asyncio.to_thread(chat.prompt, messages)
        except RowError as error:
            raise RequestError(400, str(error), "invalid_value", "messages") from None
        settings |= {
            "messages": messages,
            "stop_token_ids": [chat.stop_token_id],
            # vLLM takes these ids instead of applying a template: they are those of training.
            "kv_transfer_params": {"prompt_token_ids": prompt},
        }
        return await self._respond(
            request, "chat", self._protocol.ChatCompletionRequest, settings, request_id
        )

    async def complete(self, body: bytes, request_id: str) -> ModelResponse:
        request = parse(CompletionRequest, body)
        default = min(DEFAULT_COMPLETION_TOKENS, self._max_tokens)
        settings = self._settings(request, request.max_tokens or default)
        return await self._respond(
            request, "completions", self._protocol.CompletionRequest, settings, request_id
        )

    def _settings(self, request: SampledRequest, max_tokens: int | None) -> dict[str, Any]:
        """Returns the request's fields as arguments of the engine's request."""
        limit = self._max_tokens
        if max_tokens and max_tokens > limit:
            message = f"max_tokens is {max_tokens}, the limit is {limit}; lower it"
            raise RequestError(422, message, "too_large", "max_tokens")
        if request.stream_options and not request.stream:
            message = "stream_options without a stream; set stream: true"
            raise RequestError(400, message, "invalid_value", "stream_options")
        settings = request.model_dump(exclude_none=True, exclude={"user", "max_completion_tokens"})
        return settings | ({"max_tokens": max_tokens} if max_tokens else {})

    async def _respond(
        self,
        request: SampledRequest,
        method: str,
        engine_request_class: Any,
        settings: dict[str, Any],
        request_id: str,
    ) -> ModelResponse:
        handle = self.handle(request.model)
        try:
            engine_request = engine_request_class(**settings, request_id=request_id)
        except ValueError as error:
            raise RequestError(422, _one_line(error), "invalid_value") from None
        began = time.monotonic()
        first, rest = await _first_chunk(getattr(handle, method), engine_request, request.model)
        self._first_token_seconds.observe(time.monotonic() - began, tags={"model": request.model})
        prompt = settings.get("messages") or settings.get("prompt")
        if request.stream:
            return ModelResponse(request.model, prompt, events=_events(first, rest))
        return ModelResponse(request.model, prompt, body=first.model_dump(mode="json"))


async def _first_chunk(method: Any, engine_request: Any, model: str) -> tuple[Any, Any]:
    """Returns the first chunk of a response and the stream of the rest, after retries."""
    import ray
    from ray.serve.exceptions import BackPressureError, RayServeException

    for attempt in range(MAX_ATTEMPTS):
        if attempt:
            await asyncio.sleep(0.1 * 2**attempt)
        stream = method.remote(engine_request, None)  # None: no HTTP headers
        try:
            first = await anext(stream)
            if (failure := _failure_in(first)) is None:
                return first, stream
            if failure.status < 500:
                raise failure
            log.warning("a replica returned an error: %s", failure)
        except BackPressureError:
            message = "all replicas are busy; try again"
            raise RequestError(429, message, "overloaded", retry_after=1) from None
        except (ray.exceptions.RayError, RayServeException) as error:
            # The actor or its engine process died; another replica may be alive.
            log.warning("a replica was lost: %s", _one_line(error))
        except asyncio.CancelledError:
            stream.cancel()
            raise
    message = f"model {model!r}: {MAX_ATTEMPTS} attempts failed; try again"
    raise RequestError(503, message, "replica_lost", retry_after=1)


def _failure_in(chunk: Any) -> RequestError | None:
    """Returns the error that the model's server sent in place of an answer or a first event."""
    event = chunk[0] if isinstance(chunk, list) else chunk
    if isinstance(event, str) and event.startswith('data: {"error"'):
        error = json.loads(event.removeprefix("data: "))["error"]
    elif getattr(event, "error", None) is not None:
        error = event.error.model_dump()
    else:
        return None
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 400
    return RequestError(status, str(error.get("message")), str(error.get("type")))


async def _events(first: Any, rest: Any) -> AsyncIterator[str]:
    """Yields server-sent events as the model's server writes them."""
    import ray

    try:
        yield _event_text(first)
        async for chunk in rest:
            yield _event_text(chunk)
    except (ray.exceptions.RayError, ValueError) as error:
        log.warning("a stream was interrupted: %s", _one_line(error))
        lost = RequestError(
            503, "the answer was interrupted; send the request again", "replica_lost"
        )
        yield f"data: {json.dumps(lost.body())}\n\n"
    finally:
        # Frees the slot of a client that hung up; after the end this does nothing.
        rest.cancel()


def _event_text(chunk: Any) -> str:
    parts = chunk if isinstance(chunk, list) else [chunk]
    return "".join(
        part if isinstance(part, str) else f"data: {part.model_dump_json()}\n\n" for part in parts
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
