"""Any OpenAI-compatible endpoint as a model, and a judge that is served at an address."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zephyr_ray.engines.base import ModelSpec
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.models.contract import Message, Reply, Sampling, StopRun

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RETRIES = 6
"""Tries after the first, by the client: exponential delays, or what Retry-After says."""


class OpenAIEngine:
    """One model of one endpoint; rate limits, server errors and time-outs are retried."""

    def __init__(self, spec: ModelSpec):
        self._model, self._client = str(spec.model), _client(spec)

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        with _typed_errors(self._client, f"model '{self._model}'"):
            response = await self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
            )
        choice, usage = response.choices[0], response.usage
        return Reply(
            choice.message.content or "",
            "stop" if choice.finish_reason == "stop" else "length",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )


class ServedJudge:
    """The judge of `zephyr serve`: the same questions to it as to a judge of this process."""

    def __init__(self, spec: ModelSpec):
        self._client = _client(spec)

    async def score(self, row: dict[str, Any], completion: dict[str, Any]) -> dict[str, Any]:
        return await self._ask("score", row, {"completion": _answer(completion)})

    async def compare(
        self, row: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
    ) -> dict[str, Any]:
        return await self._ask(
            "pairwise", row, {"first": _answer(first), "second": _answer(second)}
        )

    async def _ask(self, what: str, row: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
        asked = {name: row.get(name) for name in ("prompt", "instruction", "constraint")}
        with _typed_errors(self._client, "the judge"):
            reply = await self._client.post(
                f"/judge/{what}", cast_to=object, body={"requests": [asked | answers]}
            )
        result: dict[str, Any] = reply["results"][0]
        return result


def _answer(completion: dict[str, Any]) -> dict[str, Any]:
    return {name: completion[name] for name in ("text", "finish_reason")}


def _client(spec: ModelSpec) -> "AsyncOpenAI":
    import openai

    return openai.AsyncOpenAI(
        base_url=spec.base_url, api_key=api_key(spec), max_retries=RETRIES, timeout=120
    )


@contextmanager
def _typed_errors(client: "AsyncOpenAI", what: str) -> Iterator[None]:
    """The client's errors as ours: stop the run, try again, or give up this row."""
    import openai

    address = client.base_url
    try:
        yield
    except (
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    ) as error:
        raise StopRun(f"{address} refuses {what}: {error}") from None
    except (openai.RateLimitError, openai.InternalServerError) as error:
        raise Temporary(f"{address}: {error}") from None
    except openai.APIConnectionError as error:
        raise Temporary(f"{address} does not answer: {error}") from None
    except openai.APIStatusError as error:
        raise Permanent(f"{address} refuses this prompt: {error}") from None


def api_key(spec: ModelSpec) -> str:
    """The key from the environment variable that the recipe names."""
    if spec.api_key_env is None:
        return "none"  # local servers want no key, the client wants one
    key = os.environ.get(spec.api_key_env)
    if not key:
        raise StopRun(f"environment variable {spec.api_key_env} (api_key_env) is not set")
    return key
