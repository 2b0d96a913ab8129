"""Uses an OpenAI-compatible endpoint as a model."""

import logging
import re
from typing import Annotated, Any, Literal

from pydantic import JsonValue, field_validator

from zephyr_ray.demand import Calls
from zephyr_ray.engines.endpoint import Endpoint, EndpointSettings
from zephyr_ray.engines.language import LanguageEngine, LanguageSettings
from zephyr_ray.engines.replies import Rejected, mentions, read_answer
from zephyr_ray.messages import Message
from zephyr_ray.models.contract import Reply, Sampling, StopRun
from zephyr_ray.settings import ADDED, OPERATIONAL

log = logging.getLogger("zephyr_ray")

RESERVED = {"model", "messages", "stream", "n"}
"""Parameters that the engine itself sets, or that lead to replies it cannot read."""
ADAPTABLE = {"max_tokens": "max_completion_tokens", "temperature": None, "top_p": None}
"""Other names of the parameters in every request, to try if the endpoint refuses one; a refused
parameter without another name is left out."""
UNSUPPORTED = re.compile(
    r"(un|not |n't )(support|recogni|known|expect|permit|allow|accept|available|implement)"
    r"|extra_forbidden|deprecated|invalid (parameter|argument|field)|only (one|[\d.]+ (is|are)) "
    r"|been removed|requires \W?max_completion_tokens|\bboth\b"
    r"|mutually exclusive|cannot be (specified|used|set|combined)",
    re.IGNORECASE,
)
"""Matches an error about a parameter itself, and not about its value."""


class OpenAISettings(EndpointSettings, LanguageSettings):
    """Settings of a model at an endpoint. Rate limits, server errors and timeouts are retried."""

    metered = True
    serve_cpus = 0

    engine: Literal["openai"] = "openai"
    model: str
    """The model's name at the endpoint."""
    parameters: Annotated[dict[str, JsonValue], ADDED] = {}
    """Further parameters of each request, such as reasoning_effort; they override the engine's."""
    price: Annotated[tuple[float, float] | None, OPERATIONAL] = None
    """Dollars per million prompt tokens and per million answer tokens, for the plan."""

    @field_validator("parameters")
    @classmethod
    def _leaves_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(RESERVED & value.keys()):
            raise ValueError(f"must not contain {', '.join(reserved)}")
        return value

    def start(self, seed: int) -> "OpenAIEngine":
        return OpenAIEngine(self)

    def dollars(self, calls: Calls) -> float | None:
        if self.price is None:
            return None
        return (calls.tokens_in * self.price[0] + calls.tokens_out * self.price[1]) / 1e6


class OpenAIEngine(LanguageEngine):
    """A client of the endpoint, used like an engine."""

    def __init__(self, settings: OpenAISettings):
        self._model, self._extra = settings.model, settings.parameters
        self._endpoint = Endpoint(settings, f"model '{settings.model}'")
        self._changes: dict[str, str | None] = {}
        """New names of parameters that the endpoint refused, None for those left out."""

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        while True:
            body = self._body(messages, sampling)
            try:
                return await self._endpoint.post("/chat/completions", body, read_answer)
            except Rejected as rejected:
                self._adapt(rejected, body)

    def _body(self, messages: list[Message], sampling: Sampling) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        for name, new_name in self._changes.items():
            value = parameters.pop(name)
            if new_name:
                parameters[new_name] = value
        return {"model": self._model, "messages": messages, **parameters, **self._extra}

    def _adapt(self, rejected: Rejected, body: dict[str, Any]) -> None:
        """Renames or leaves out, from now on, the parameter that the endpoint does not support.

        Raises StopRun if that did not help, and `rejected` if the error is about something else.
        """
        error = rejected.error
        if not UNSUPPORTED.search(f"{error.codes} {error.message}"):
            raise rejected
        changed = [(name, new_name) for name, new_name in self._changes.items() if name in body]
        if any(error.names(name) or error.names(new_name or name) for name, new_name in changed):
            return  # another row adapted it while this request was in flight
        sent = "\n".join(message["content"] for message in body["messages"])
        names = [
            name
            for name in {*body, *self._changes, *filter(None, ADAPTABLE.values())}
            # The error may quote the row, whose words must not change the requests of other rows.
            if error.names(name) and (error.param or not mentions(sent, name))
        ]
        refused = [
            name
            for name, new_name in ADAPTABLE.items()
            if name in body and name not in self._extra and {name, new_name} & set(names)
        ]
        if refused:
            # If two parameters exclude each other, temperature stays.
            name = refused[-1]
            self._changes[name] = new_name = ADAPTABLE[name]
            instead = f"sending {new_name} instead" if new_name else "leaving it out"
            log.warning("%s does not support %s; %s", self._endpoint.name, name, instead)
        elif set(names) - RESERVED:
            raise StopRun(f"{rejected}; correct the model's parameters") from None
        else:
            raise rejected
