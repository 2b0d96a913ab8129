"""Uses an OpenAI-compatible endpoint as a model."""

import logging
import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from zephyr_ray.demand import Calls
from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.batches import MOST_LINES, Batches, read_unfinished
from zephyr_ray.engines.choices import JoinedRequests, Outcome, read_choices
from zephyr_ray.engines.endpoint import Endpoint, EndpointSettings
from zephyr_ray.engines.language import LanguageEngine, LanguageSettings, RowAsk
from zephyr_ray.engines.logprobs import LOGPROBS
from zephyr_ray.engines.meter import most_tokens
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.replies import Rejected, mentions
from zephyr_ray.engines.settings import BLOCKS_IN_FLIGHT
from zephyr_ray.engines.tariff import MILLION, Price, Tariff
from zephyr_ray.messages import Message
from zephyr_ray.models.contract import Reply, Sampling, StopRun
from zephyr_ray.settings import ADDED, OPERATIONAL

Prices = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=2, max_length=3)]

log = logging.getLogger("zephyr_ray")

RESERVED = {"model", "messages", "stream", "n"}
"""Parameters that the engine itself sets, or that lead to replies it cannot read."""
ADAPTABLE = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "top_p": None,
    "response_format": None,
    "n": None,
}
"""Other names of the parameters that the engine sends, to try if the endpoint refuses one; a
refused parameter without another name is left out."""
OPTIONAL = ("response_format", "n")
"""Parameters that only improve a request: left out even if just their value is refused."""
FORMATS = {
    *("response_format", "structured_outputs", "grammar", "json_schema", "tools"),
    *("guided_json", "guided_choice", "guided_regex", "guided_grammar"),
}
"""Parameters of a recipe that state the format of answers, as endpoints and servers name them; they
take the place of a judge form's schema."""
BATCH_PRICE = 0.5
"""Price of a request in a batch, as a fraction of its price outside one."""
BATCH_LASTS = 26 * 3600
"""Maximum seconds of a batch: the 24 hours that it has, and time to send and collect it."""
UNSUPPORTED = re.compile(
    r"(un|not |n't )(support|recogni|known|expect|permit|allow|accept|available|implement)"
    r"|extra_forbidden|deprecated|invalid (parameter|argument|field)|only (one|[\d.]+ (is|are)) "
    r"|been removed|requires \W?max_completion_tokens|\bboth\b"
    r"|mutually exclusive|cannot be (specified|used|set|combined)",
    re.IGNORECASE,
)
"""Matches an error about a parameter itself, not about its value."""


class OpenAISettings(EndpointSettings, LanguageSettings):
    """Settings of a model at an endpoint. Rate limits, server errors and timeouts are retried."""

    metered = True
    gives_logprobs = True
    limits = "The model behind a name at an endpoint may change, so another run may differ."
    serve_cpus = 0

    engine: Literal["openai"] = "openai"
    model: str
    """The model's name at the endpoint."""
    parameters: Annotated[dict[str, JsonValue], ADDED] = {}
    """Further parameters of each request, such as reasoning_effort; they override the engine's."""
    price: Annotated[Prices | None, OPERATIONAL] = None
    """Dollars per million tokens: input, output and, if it differs, cached input."""
    batch: Annotated[bool, OPERATIONAL] = False
    """Send the requests of stages in batches (OpenAI's Batch API), at half the price. Each waits up
    to 24 hours; by default, all rows of an actor are in flight at once."""
    requests_per_minute: Annotated[int | None, OPERATIONAL] = Field(None, ge=1)
    tokens_per_minute: Annotated[int | None, OPERATIONAL] = Field(None, ge=1)
    """The endpoint's limits, which all actors of a run, and models with the same `model` and
    `base_url`, share; they do not apply to batches."""

    @field_validator("parameters")
    @classmethod
    def _leaves_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(RESERVED & value.keys()):
            raise ValueError(f"must not contain {', '.join(reserved)}")
        return value

    @field_validator("batch")
    @classmethod
    def _needs_one_actor(cls, value: bool, settings: ValidationInfo) -> bool:
        # After a kill, each of several actors could create the batch of the same file.
        if value and settings.data.get("actors", 1) > 1:
            raise ValueError("needs actors: 1; one actor sends the requests of all rows")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fills_batches(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("batch"):
            return {"concurrency": MOST_LINES, **settings}
        return settings

    @property
    def blocks_per_actor(self) -> int:
        # All blocks of a batched model are in flight at once, so that their requests share batches.
        return BLOCKS_IN_FLIGHT if self.batch else super().blocks_per_actor

    @property
    def rows_in_flight(self) -> int:
        return self.concurrency if self.batch else super().rows_in_flight

    def preflight(self) -> None:
        if self.tariff():
            most_tokens({"max_tokens": 1, **self.parameters}, self.model)
        super().preflight()

    def start(self, seed: int) -> "OpenAIEngine":
        return OpenAIEngine(self)

    def dollars(self, calls: Calls) -> float | None:
        if self.price is None:
            return None
        full = (calls.tokens_in * self.price[0] + calls.tokens_out * self.price[1]) / MILLION
        return full * BATCH_PRICE if self.batch else full

    def tariff(self) -> Tariff | None:
        account = f"{self.model} at {self.base_url}"
        if self.batch:
            price = self.price and Price.of(tuple(BATCH_PRICE * part for part in self.price))
            return (
                Tariff(f"{account} in batches", price=price, lasts=BATCH_LASTS) if price else None
            )
        limits = self.requests_per_minute, self.tokens_per_minute
        if self.price is None and not any(limits):
            return None
        return Tariff(account, *limits, Price.of(self.price) if self.price else None)


class OpenAIEngine(LanguageEngine):
    """A client of the endpoint, used like an engine."""

    def __init__(self, settings: OpenAISettings):
        self._model, self._extra = settings.model, settings.parameters
        self._endpoint = Endpoint(settings, f"model '{settings.model}'")
        self._is_batched = settings.batch
        self._batches: Batches | None = None
        self._log: AnswerLog | None = None
        self._joined = JoinedRequests(self._request)
        self._changes: dict[str, str | None] = {}
        """New names of parameters that the endpoint refused, None for those left out."""

    def ask_for(self, model: Model, row: dict[str, Any]) -> RowAsk:
        if (log := model.answers) and self._log is None:
            if self._is_batched or read_unfinished(log):
                self._batches = Batches(self._endpoint, log, creates=self._is_batched)
            # Another actor may have finished a batch after this one read the log.
            log.refresh()
            self._log = log
        return super().ask_for(model, row)

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        return await self._joined.answer(messages, sampling, key="")

    async def answer_into(
        self, log: AnswerLog, key: str, messages: list[Message], sampling: Sampling
    ) -> Reply:
        self._log = log
        if self._batches:
            self._batches.answers = log
            if earlier := await self._batches.collect(key):
                return earlier
        return await self._joined.answer(messages, sampling, key)

    async def _request(
        self, messages: list[Message], sampling: Sampling, keys: list[str]
    ) -> list[Outcome]:
        """Sends one request for as many choices as there are keys; returns those of the reply."""
        while True:
            body = self._body(messages, sampling, len(keys))
            try:
                if self._batches and self._is_batched:
                    return await self._batches.post(body, keys)
                read = partial(self._read, keys)
                return await self._endpoint.post("/chat/completions", body, read)
            except Rejected as rejected:
                self._adapt(rejected, body)

    def _read(self, keys: list[str], data: dict[str, Any], where: str) -> list[Outcome]:
        """Returns the choices of a reply; writes the answers to the log at once, because a kill
        while the cost is settled would lose them."""
        choices = read_choices(data, where, len(keys))
        for key, choice in zip(keys, choices, strict=False):
            if self._log and key and isinstance(choice, Reply):
                self._log.append(key, choice)
        return choices

    def _body(self, messages: list[Message], sampling: Sampling, count: int) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        # The API accepts only schemas of objects.
        is_object = sampling.schema is not None and sampling.schema.get("type") == "object"
        if is_object and not self._extra.keys() & FORMATS:
            form = {"name": "answer", "strict": True, "schema": sampling.schema}
            parameters["response_format"] = {"type": "json_schema", "json_schema": form}
        if sampling.top_logprobs:
            parameters |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
        if count > 1:
            parameters["n"] = count
        for name in parameters.keys() & self._changes.keys():
            value, new_name = parameters.pop(name), self._changes[name]
            if new_name:
                parameters[new_name] = value
        return {"model": self._model, "messages": messages, **parameters, **self._extra}

    def _adapt(self, rejected: Rejected, body: dict[str, Any]) -> None:
        """Renames or leaves out, from now on, the parameter that the endpoint does not support.

        Raises StopRun if that did not help, and `rejected` if the error is about something else.
        """
        error = rejected.error
        sent = "\n".join(message["content"] for message in body["messages"])
        # The error may quote the row, whose words must not change the requests of other rows.
        if "logprobs" in body and error.is_about_logprobs and not LOGPROBS.search(sent):
            raise StopRun(f"{rejected}; name another judge, or use another form of question")
        unsupported = UNSUPPORTED.search(f"{error.codes} {error.message}") is not None
        adaptable = ADAPTABLE if unsupported else dict.fromkeys(OPTIONAL)
        changed = [
            (name, new_name)
            for name, new_name in self._changes.items()
            if name in body and name in adaptable
        ]
        if any(error.names(name) or error.names(new_name or name) for name, new_name in changed):
            return  # another row adapted it while this request was in flight
        names = [
            name
            for name in {*body, *self._changes, *filter(None, ADAPTABLE.values())}
            if error.names(name) and (error.param or not mentions(sent, name))
        ]
        refused = [
            name
            for name, new_name in adaptable.items()
            if name in body and name not in self._extra and {name, new_name} & set(names)
        ]
        if refused:
            # If two parameters exclude each other, temperature stays.
            name = refused[-1]
            self._changes[name] = new_name = adaptable[name]
            instead = f"sending {new_name} instead" if new_name else "leaving it out"
            log.warning("%s does not support %s; %s", self._endpoint.name, name, instead)
        elif unsupported and set(names) - RESERVED:
            raise StopRun(f"{rejected}; correct the model's parameters") from None
        else:
            raise rejected
