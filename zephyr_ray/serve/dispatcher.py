"""Sends each request to a replica of its model, and returns the response, complete or as
server-sent events.

If a replica is lost before its response begins, the request is retried. If it is lost later, the
response ends with an error event: a retry would repeat what the client already has.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import RowError
from zephyr_ray.serve.request_error import RequestError
from zephyr_ray.serve.requests import (
    IGNORED,
    ChatRequest,
    CompletionRequest,
    SampledRequest,
    first_error,
    parse,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger("zephyr_ray.serve")

MAX_ATTEMPTS = 4
"""Maximum attempts per request."""
DEFAULT_COMPLETION_TOKENS = 16
"""Maximum tokens of a plain completion if the client sets none, as in OpenAI's API."""
_FIELD = re.compile(r" \((parameter|value)=")


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
            # vLLM uses these ids instead of its chat template, so that they match training.
            "kv_transfer_params": {"prompt_token_ids": prompt},
        }
        return await self._respond(
            request, "chat", self._protocol.ChatCompletionRequest, settings, request_id
        )

    async def complete(self, body: bytes, request_id: str) -> ModelResponse:
        request = parse(CompletionRequest, body)
        default = min(DEFAULT_COMPLETION_TOKENS, self._max_tokens)
        maximum = default if request.max_tokens is None else request.max_tokens
        settings = self._settings(request, maximum)
        self._check_tokens(request)
        return await self._respond(
            request, "completions", self._protocol.CompletionRequest, settings, request_id
        )

    def _check_tokens(self, request: CompletionRequest) -> None:
        """Raises RequestError 400 if the prompt contains a token ID outside the model's vocabulary.

        vLLM accepts an ID equal to the vocabulary size, and its engine then crashes.
        """
        self.handle(request.model)
        size = self._chat_formats[request.model].vocabulary_size
        prompts = request.prompt if isinstance(request.prompt, list) else []
        ids = [i for part in prompts for i in (part if isinstance(part, list) else [part])]
        if any(isinstance(token, int) and token >= size for token in ids):
            message = f"prompt: token IDs must be below {size}, the size of the vocabulary"
            raise RequestError(400, message, "invalid_value", "prompt")

    def _settings(self, request: SampledRequest, max_tokens: int | None) -> dict[str, Any]:
        """Returns the request's fields as arguments of the engine's request."""
        limit = self._max_tokens
        if max_tokens is not None and max_tokens > limit:
            message = f"max_tokens is {max_tokens}, the limit is {limit}; lower it"
            raise RequestError(400, message, "too_large", "max_tokens")
        if request.stream_options and not request.stream:
            message = "stream_options needs a stream; set stream: true"
            raise RequestError(400, message, "invalid_value", "stream_options")
        settings = request.model_dump(
            exclude_none=True, exclude={*IGNORED, "max_completion_tokens"}
        )
        if max_tokens is not None:
            settings["max_tokens"] = max_tokens
        if request.temperature == 0 and (request.n or 1) > 1:
            message = "n: all answers at temperature 0 are the same; set n: 1 or raise temperature"
            raise RequestError(400, message, "invalid_value", "n")
        return settings

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
        except Exception as error:
            if (refusal := _refusal(error)) is None:
                raise
            raise refusal from None
        began = time.monotonic()
        first, rest = await _first_chunk(getattr(handle, method), engine_request, request.model)
        self._first_token_seconds.observe(time.monotonic() - began, tags={"model": request.model})
        prompt = settings.get("messages") or settings.get("prompt")
        if request.stream:
            return ModelResponse(request.model, prompt, events=_events(first, rest))
        return ModelResponse(request.model, prompt, body=first.model_dump(mode="json"))


async def _first_chunk(method: Any, engine_request: Any, model: str) -> tuple[Any, Any]:
    """Returns the first chunk of a response and the stream of the rest; retries if a replica is
    lost."""
    from ray.serve.exceptions import BackPressureError

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
        except RequestError:
            raise
        except Exception as error:
            # The model server's own exception arrives as the cause of a RayTaskError, or unwrapped
            # if Serve uses gRPC.
            cause = getattr(error, "cause", None)
            if refusal := _refusal(cause if isinstance(cause, Exception) else error):
                raise refusal from None
            # The actor or its engine process died; another replica may be alive.
            log.warning("a replica was lost: %s", _one_line(error))
        except asyncio.CancelledError:
            stream.cancel()
            raise
    message = f"model {model!r}: {MAX_ATTEMPTS} attempts failed; try again"
    raise RequestError(503, message, "replica_lost", retry_after=1)


def _refusal(error: Exception) -> RequestError | None:
    """Returns the error response if the engine refused the request, None if the engine failed."""
    if isinstance(error, ValidationError):
        return first_error(error)
    # Let vLLM distinguish request errors from engine failures.
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    failure = _as_request_error(create_error_response(error).error.model_dump())
    return failure if failure.status < 500 else None


def _failure_in(chunk: Any) -> RequestError | None:
    """Returns the error that the model server sent instead of an answer or an event."""
    event = chunk[0] if isinstance(chunk, list) else chunk
    if isinstance(event, str) and event.startswith('data: {"error"'):
        return _as_request_error(json.loads(event.removeprefix("data: "))["error"])
    if getattr(event, "error", None) is not None:
        return _as_request_error(event.error.model_dump())
    return None


def _as_request_error(error: dict[str, Any]) -> RequestError:
    """Converts vLLM's error to a RequestError."""
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 400
    message = str(error.get("message"))
    # vLLM appends the field, which `param` already names, and the value that the client sent.
    if message.endswith(")") and (field := _FIELD.search(message)):
        message = message[: field.start()]
    return RequestError(status, message, "invalid_value", error.get("param"))


async def _events(first: Any, rest: Any) -> AsyncIterator[str]:
    """Yields the model server's events; converts its errors to events in OpenAI's shape."""
    lost = RequestError(503, "the answer was interrupted; send the request again", "replica_lost")
    try:
        yield _event_text(first)
        async for chunk in rest:
            if (failure := _failure_in(chunk)) is not None:
                log.warning("a stream failed: %s", failure)
                yield _error_event(failure if failure.status < 500 else lost)
                return
            yield _event_text(chunk)
    except Exception as error:
        log.warning("a stream was interrupted: %s", _one_line(error))
        yield _error_event(lost)
    finally:
        # Frees the slot if the client hung up; has no effect on a stream that has ended.
        rest.cancel()


def _error_event(error: RequestError) -> str:
    return f"data: {json.dumps(error.body())}\n\n"


def _event_text(chunk: Any) -> str:
    parts = chunk if isinstance(chunk, list) else [chunk]
    return "".join(
        part if isinstance(part, str) else f"data: {part.model_dump_json()}\n\n" for part in parts
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
