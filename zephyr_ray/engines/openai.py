"""Uses an OpenAI-compatible endpoint as a model."""

from typing import Annotated, Literal

from zephyr_ray.demand import Calls
from zephyr_ray.engines.endpoint import EndpointSettings, typed_errors
from zephyr_ray.engines.language import LanguageEngine, LanguageSettings
from zephyr_ray.messages import Message
from zephyr_ray.models.contract import Reply, Sampling
from zephyr_ray.settings import OPERATIONAL


class OpenAISettings(EndpointSettings, LanguageSettings):
    """Settings of a model at an endpoint. Rate limits, server errors and timeouts are retried."""

    metered = True
    serve_cpus = 0

    engine: Literal["openai"] = "openai"
    model: str
    """The model's name at the endpoint."""
    price: Annotated[tuple[float, float] | None, OPERATIONAL] = None
    """Dollars per million prompt tokens and per million answer tokens, for the plan."""

    def start(self, seed: int) -> "OpenAIEngine":
        return OpenAIEngine(self)

    def dollars(self, calls: Calls) -> float | None:
        if self.price is None:
            return None
        return (calls.tokens_in * self.price[0] + calls.tokens_out * self.price[1]) / 1e6


class OpenAIEngine(LanguageEngine):
    """A client of the endpoint, used like an engine."""

    def __init__(self, settings: OpenAISettings):
        self._model, self._client = settings.model, settings.client()

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        with typed_errors(self._client, f"model '{self._model}'"):
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
