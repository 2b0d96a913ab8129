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
        special_tokens: dict[str, list[str]],
        max_tokens: int,
    ):
        from ray.util.metrics import Histogram

        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._special, self._max_tokens = special_tokens, max_tokens
        self._first = Histogram(
            "zephyr_first_token_seconds",
            "Seconds to the first token, or to the whole answer where it is not streamed",
            [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
            ("model",),
        )

    @property
    def names(self) -> list[str]:
        return list(self._handles)

    async def chat(self, body: bytes, request_id: str) -> Answer:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest

        asked = parse(ChatRequest, body)
        messages = [message.plain() for message in asked.messages]
        for message in messages:
            message["content"] = defused(message["content"], self._special.get(asked.model, []))
        settings = self._settings(asked, asked.max_completion_tokens or asked.max_tokens)
        settings |= {"messages": messages}
        settings.pop("max_completion_tokens", None)
        return await self._answer(asked, "chat", ChatCompletionRequest, settings, request_id)

    async def complete(self, body: bytes, request_id: str) -> Answer:
        from ray.serve.llm.openai_api_models import CompletionRequest as TheirRequest

        asked = parse(CompletionRequest, body)
        settings = self._settings(asked, asked.max_tokens or COMPLETION_TOKENS)
        return await self._answer(asked, "completions", TheirRequest, settings, request_id)

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
        handle = self._handles.get(asked.model)
        if handle is None:
            known = ", ".join(self._handles)
            message = f"no model {asked.model[:64]!r} here; there is {known}"
            raise RequestError(404, message, "model_not_found", "model")
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
    from ray.serve.exceptions import BackPressureError

    for attempt in range(TRIES):
        stream = method.remote(theirs, None)
        try:
            first = await anext(stream)
            break
        except BackPressureError:
            message = "all replicas are busy; try again"
            raise RequestError(429, message, "overloaded", retry_after=1) from None
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError) as error:
            log.warning("a replica was lost: %s", _line(error))
            await asyncio.sleep(0.2 * 2**attempt)
        except ray.exceptions.RayTaskError as error:
            log.error("the model failed: %s", error)
            raise RequestError(500, "the model failed", "engine_error") from None
        except asyncio.CancelledError:
            stream.cancel()
            raise
    else:
        message = "the model's replicas were lost; try again"
        raise RequestError(503, message, "replica_lost", retry_after=1)
    told = first[0] if isinstance(first, list) else first
    if (fault := getattr(told, "error", None)) is not None:
        status = fault.code if isinstance(fault.code, int) and 400 <= fault.code < 600 else 400
        raise RequestError(status, fault.message, str(fault.type))
    return first, stream


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


def defused(text: str, special: list[str]) -> str:
    """Text in which no special token stands: one typed by a user would end or open a turn."""
    for token in special:
        text = text.replace(token, token[0] + "\u200b" + token[1:])
    return text


def _text(chunk: Any) -> str:
    parts = chunk if isinstance(chunk, list) else [chunk]
    return "".join(
        part if isinstance(part, str) else f"data: {part.model_dump_json()}\n\n" for part in parts
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
