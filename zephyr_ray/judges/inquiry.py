"""Asks a judge the questions of judge forms, and asks once more if a reply cannot be read."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from zephyr_ray.errors import RowError
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.verdict import Verdict
from zephyr_ray.messages import Message, assistant, user, visible
from zephyr_ray.models.contract import Ask, Reply, TopLogprobs

MORE_ROOM = 4
"""Factor on the maximum tokens of a second reply, if the first one was cut off."""

T = TypeVar("T")
Parse = Callable[[str, bool], Verdict]
"""Returns the verdict of a reply's text; the second argument is whether the reply was cut off."""
ParseToken = Callable[[TopLogprobs], Verdict]
"""Returns the verdict of the tokens that may begin a reply."""


@dataclass(frozen=True)
class Format:
    """The format of a reply."""

    text: str
    """Description of the format for the judge, the value of the placeholder $reply."""
    max_tokens: int
    """Maximum tokens per reply."""
    schema: dict[str, Any] | None = None
    """JSON schema, for engines that can enforce it. Endpoints ignore it unless its root is an
    object, as OpenAI requires."""
    top_logprobs: int = 0
    """Number of most likely first tokens to get with the reply."""


def object_schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of an object with exactly these properties, in this order."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


async def at_once(*questions: Awaitable[T]) -> list[T]:
    """Asks questions at the same time, so that they can share a batch, and returns their results.
    If one fails, raises its error once all have ended, because requests in flight are paid for."""
    results = await asyncio.gather(*questions, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


class Inquiry:
    """The questions to a judge about one row."""

    def __init__(self, ask: Ask, wordings: Mapping[str, str] | None = None):
        """`wordings` replace those of questions, by name."""
        self._ask, self._wordings = ask, wordings or {}
        self.repeated = 0
        """Questions that were asked a second time."""

    async def put(
        self, question: Question, values: dict[str, str], form: Format, parse: Parse
    ) -> tuple[Verdict, str]:
        """Returns the verdict and the text of the judge's reply. If the reply cannot be read, tells
        the judge why and asks once more. The verdict says None if the second one cannot be read
        either."""

        def read(reply: Reply, form: Format) -> Verdict:
            cut = reply.finish_reason == "length"
            verdict = parse(reply.text, cut)
            if verdict.says is None and cut:
                fault = f"it was cut off at the limit of {form.max_tokens} tokens"
                verdict = replace(verdict, fault=fault)
            return verdict

        verdict, reply = await self._put(question, values, form, read)
        return verdict, reply.text.strip()

    async def put_for_token(
        self, question: Question, values: dict[str, str], form: Format, parse: ParseToken
    ) -> tuple[Verdict, TopLogprobs]:
        """Returns the verdict and the tokens that may begin the judge's reply; asks once more as
        `put` does."""

        def read(reply: Reply, _: Format) -> Verdict:
            return parse(reply.top_logprobs)

        verdict, reply = await self._put(question, values, form, read)
        return verdict, reply.top_logprobs

    async def _put(
        self,
        question: Question,
        values: dict[str, str],
        form: Format,
        read: Callable[[Reply, Format], Verdict],
    ) -> tuple[Verdict, Reply]:
        values = {"reply": form.text, **values}
        messages = [user(question.fill(values, self._wordings.get(question.name)))]
        reply = await self._request(messages, form)
        verdict = read(reply, form)
        if verdict.says is not None:
            return verdict, reply
        self.repeated += 1
        messages = [
            *messages,
            # Some endpoints and chat templates refuse an empty message.
            assistant(reply.text if visible(reply.text) else "(empty)"),
            user(
                f"Your reply cannot be read: {verdict.fault}. Reply again, with nothing but\n"
                f"{form.text}"
            ),
        ]
        if reply.finish_reason == "length" and not form.top_logprobs:
            form = replace(form, max_tokens=MORE_ROOM * form.max_tokens)
        # The first reply stands if the longer conversation fails, for example exceeds the context.
        with suppress(RowError):
            reply = await self._request(messages, form)
            verdict = read(reply, form)
        return verdict, reply

    async def _request(self, messages: list[Message], form: Format) -> Reply:
        return await self._ask(
            messages,
            max_tokens=form.max_tokens,
            with_demonstrations=False,
            schema=form.schema,
            top_logprobs=form.top_logprobs,
        )
