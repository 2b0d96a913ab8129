"""Any OpenAI-compatible endpoint as a model."""

import os

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.models.contract import Message, Reply, Sampling, StopRun
from zephyr_ray.recipe import ModelSpec

RETRIES = 6
"""Tries after the first, by the client: exponential delays, or what Retry-After says."""


class OpenAIEngine:
    """One model of one endpoint; rate limits, server errors and time-outs are retried."""

    def __init__(self, spec: ModelSpec):
        import openai

        self._errors = openai
        self._model = str(spec.model)
        self._client = openai.AsyncOpenAI(
            base_url=spec.base_url, api_key=api_key(spec), max_retries=RETRIES, timeout=120
        )

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        errors = self._errors
        try:
            response = await self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
            )
        except (
            errors.AuthenticationError,
            errors.PermissionDeniedError,
            errors.NotFoundError,
        ) as error:
            raise StopRun(
                f"{self._client.base_url} refuses model '{self._model}': {error}"
            ) from None
        except (errors.RateLimitError, errors.InternalServerError) as error:
            raise Temporary(f"{self._client.base_url}: {error}") from None
        except errors.APIConnectionError as error:
            raise Temporary(f"{self._client.base_url} does not answer: {error}") from None
        except errors.APIStatusError as error:
            raise Permanent(f"{self._client.base_url} refuses this prompt: {error}") from None
        choice, usage = response.choices[0], response.usage
        return Reply(
            choice.message.content or "",
            "stop" if choice.finish_reason == "stop" else "length",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
        )


def api_key(spec: ModelSpec) -> str:
    """The key from the environment variable that the recipe names."""
    if spec.api_key_env is None:
        return "none"  # local servers want no key, the client wants one
    key = os.environ.get(spec.api_key_env)
    if not key:
        raise StopRun(f"environment variable {spec.api_key_env} (api_key_env) is not set")
    return key
