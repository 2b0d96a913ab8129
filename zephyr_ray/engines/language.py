"""Defines what engines of language models share: sampling settings, and the `ask` of one row."""

import asyncio
from collections import Counter
from dataclasses import replace
from itertools import takewhile
from typing import Annotated, Any, ClassVar

from pydantic import Field

from zephyr_ray import judges
from zephyr_ray.engines import demonstrations
from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.meter import METER
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.messages import Message, encodable, plain
from zephyr_ray.models.contract import Reply, Sampling, StopRun
from zephyr_ray.models.shapes import Shape
from zephyr_ray.settings import ADDED, FILE


class LanguageSettings(ModelSettings):
    """Settings shared by all engines that answer prompts."""

    uses: ClassVar[frozenset[str]] = frozenset({"model", "judge"})
    gives_logprobs: ClassVar[bool] = False
    """Whether the engine can return log-probabilities of tokens, which some judge forms read."""

    temperature: float = Field(0.7, ge=0)
    """The paper samples for evaluation at temperature 0.7, top-p 0.95 (arXiv 2310.16944)."""
    top_p: float = Field(0.95, gt=0, le=1)
    demonstrations: Annotated[str | None, FILE] = None
    """JSONL of worked examples, shown before prompts with the same kind of constraint."""
    questions: Annotated[str | None, FILE, ADDED] = None
    """YAML with other wordings of a judge's questions, by their names in judges/questions.yaml."""
    context: int = Field(2048, ge=16)
    """Maximum tokens of prompt and answer together; a row that needs more fails."""

    def limit(self, shape: Shape | None) -> int | None:
        # An endpoint has a limit of its own, which the default does not state.
        return self.context if "context" in self.model_fields_set else None

    def judges(self, form: str) -> bool:
        return super().judges(form) and (self.gives_logprobs or form not in judges.LOGPROB_FORMS)


class LanguageEngine:
    """A running language model. Subclasses answer single requests."""

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        """Returns the answer. Raises RowError, StopRun or Temporary as `Ask` does."""
        raise NotImplementedError

    async def answer_into(
        self, log: AnswerLog, key: str, messages: list[Message], sampling: Sampling
    ) -> Reply:
        """Returns the answer after writing it to the log under the request's key."""
        reply = await self.answer(messages, sampling)
        log.append(key, reply)
        return reply

    def ask_for(self, model: Model, row: dict[str, Any]) -> "RowAsk":
        return RowAsk(self, model, row)


class RowAsk:
    """The `ask` of one row: applies its model's sampling settings and demonstrations, and reuses
    answers in the model's log.

    Equal requests of rows with the same "sample", by default the row's "id", are the same request.
    """

    def __init__(self, engine: LanguageEngine, model: Model, row: dict[str, Any]):
        assert isinstance(model.settings, LanguageSettings)
        self._engine, self._settings, self._log = engine, model.settings, model.answers
        self._name, self._meter, self._wordings = model.name, model.meter, model.wordings
        self._sample = row.get("sample", row.get("id"))
        self._equal = Counter[str]()
        """Number of equal requests so far, by the key of the first."""
        kind = (row.get("constraint") or {}).get("kind")
        self._demonstrations = demonstrations.turns(model.demonstrations, kind)

    async def __call__(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        with_demonstrations: bool = True,
        schema: dict[str, Any] | None = None,
        temperature: float | None = None,
        top_logprobs: int = 0,
    ) -> Reply:
        if temperature is None:
            temperature = self._settings.temperature
        sampling = Sampling(temperature, self._settings.top_p, max_tokens, schema)
        if top_logprobs:
            # Some endpoints scale log-probabilities by the temperature, or cut them off at top-p.
            sampling = replace(sampling, temperature=1.0, top_p=1.0, top_logprobs=top_logprobs)
        system = list(takewhile(lambda m: m["role"] == "system", messages))
        examples = self._demonstrations if with_demonstrations else []
        shown = plain([*system, *examples, *messages[len(system) :]])
        # Texts of files, such as seeds and demonstrations, may hold lone surrogates.
        turns = [message | {"content": encodable(message["content"])} for message in shown]
        METER.set(self._meter)
        reply = await self._answer(turns, sampling)
        if _lacks_logprobs(reply, sampling):
            raise StopRun(
                f"model '{self._name}' gives no log-probabilities, which this form of question "
                "reads; name another judge, or use another form"
            )
        return reply

    async def _answer(self, turns: list[Message], sampling: Sampling) -> Reply:
        if self._log is None:
            return await self._engine.answer(turns, sampling)
        key = self._key(self._log, turns, sampling)
        while True:
            reply = self._log.find(key)
            if reply and not _lacks_logprobs(reply, sampling):
                return reply
            if (asked := self._log.in_flight.get(key)) is None:
                return await self._send(self._log, key, turns, sampling)
            await asyncio.wait({asked})
            if not asked.cancelled():
                return asked.result()

    async def _send(
        self, log: AnswerLog, key: str, turns: list[Message], sampling: Sampling
    ) -> Reply:
        """Sends a request; equal ones of other rows wait for its answer. They share its error too,
        because its batch may be under way, but not its cancellation."""
        log.open()
        log.in_flight[key] = answer = asyncio.get_running_loop().create_future()
        try:
            reply = await self._engine.answer_into(log, key, turns, sampling)
            answer.set_result(reply)
            return reply
        except Exception as error:
            answer.set_exception(error)
            answer.exception()  # marks it as retrieved: perhaps nobody waits for it
            raise
        finally:
            answer.cancel()
            del log.in_flight[key]

    def _key(self, log: AnswerLog, turns: list[Message], sampling: Sampling) -> str:
        """Returns the request's key in the log, which differs between equal requests."""
        first = log.key(turns, sampling, self._sample)
        number = self._equal[first]
        self._equal[first] += 1
        return log.key(turns, sampling, [self._sample, number]) if number else first

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return await judges.judge(form, row, answers, self, self._wordings)


def _lacks_logprobs(reply: Reply, sampling: Sampling) -> bool:
    """Returns whether the model ignored that log-probabilities were asked for. An answer that ends
    at once may have none."""
    return bool(sampling.top_logprobs and reply.text and not reply.top_logprobs)
