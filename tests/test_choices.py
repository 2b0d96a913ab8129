"""Tests requests that several rows share, and answers that follow a schema."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fake_answers import count_tokens
from fake_endpoint import Answer, completion, endpoint, error
from fake_provider import Behavior, Provider, provider

from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.meter import Meter
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAIEngine, OpenAISettings
from zephyr_ray.engines.tariff import Usage
from zephyr_ray.errors import RowError
from zephyr_ray.messages import assistant, user
from zephyr_ray.models.contract import Reply, Sampling

SAMPLING = Sampling(0.7, 0.9, 40)
OBJECT = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["score"],
    "additionalProperties": False,
}


def ask(
    url: str, questions: list[str], sampling: Sampling = SAMPLING, **settings: Any
) -> list[Any]:
    """Returns the replies (or errors) to questions that rows of one engine ask concurrently."""

    async def main() -> list[Any]:
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=url, **settings))
        answers = (engine.answer([user(text)], sampling) for text in questions)
        return await asyncio.gather(*answers, return_exceptions=True)

    return asyncio.run(main())


def counts(server: Provider) -> list[int]:
    """Returns the number of choices that each request asks for."""
    return [body.get("n", 1) for body in server.bodies]


def test_rows_with_the_same_request_share_it_and_get_a_choice_each() -> None:
    with provider() as server:
        replies = ask(server.url, ["Hi", "Name a fish.", "Hi", "Hi"], Sampling(0.7, 0.9, 400))
    assert sorted(counts(server)) == [1, 3]
    assert len({reply.text for reply in replies}) == 4
    bill = server.bills["peer"]
    assert sum(r.prompt_tokens for r in replies) == bill.prompt_tokens
    assert sum(r.completion_tokens for r in replies) == bill.completion_tokens
    assert all(abs(r.completion_tokens - count_tokens(r.text)) <= 1 for r in replies)


def test_rows_that_share_with_a_cancelled_row_ask_for_themselves() -> None:
    async def main(url: str) -> list[Any]:
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=url))
        rows = [asyncio.create_task(engine.answer([user("Hi")], SAMPLING)) for _ in range(3)]
        await asyncio.sleep(0)
        rows[0].cancel()
        return await asyncio.wait_for(asyncio.gather(*rows, return_exceptions=True), 60)

    with provider() as server:
        cancelled, *replies = asyncio.run(main(server.url))
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [type(reply) for reply in replies] == [Reply, Reply] and counts(server) == [1, 1]


@pytest.mark.parametrize(
    ("behavior", "sent"),
    [
        (Behavior(refuses=("n",)), [4, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Behavior(most_choices=1), [4, 1, 1, 1, 1, 1, 1, 1]),
        (Behavior(most_choices=3), [4, 1, 3, 1]),
    ],
    ids=["refused", "ignored", "limited"],
)
def test_an_endpoint_that_gives_fewer_choices_is_asked_again(
    behavior: Behavior, sent: list[int]
) -> None:
    """Four rows ask; then, once the engine knows the endpoint's limit, four more."""

    async def main(url: str) -> list[Reply]:
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=url))
        rows = [
            await asyncio.gather(*(engine.answer([user("Hi")], SAMPLING) for _ in range(4)))
            for _ in range(2)
        ]
        return [*rows[0], *rows[1]]

    with provider(behavior) as server:
        replies = asyncio.run(main(server.url))
    assert counts(server) == sent
    assert len({reply.text for reply in replies}) == 8


def test_more_rows_than_choices_per_request_send_several_requests() -> None:
    with provider() as server:
        replies = ask(server.url, ["Hi"] * 20)
    assert sorted(counts(server)) == [4, 8, 8]
    assert len({reply.text for reply in replies}) == 20


def choices(*contents: str | None, **ends: str) -> Answer:
    each = [completion(text, ends.get(f"end_{i}", "stop")) for i, text in enumerate(contents)]
    return Answer(200, completion() | {"choices": [one["choices"][0] for one in each]})


def test_a_choice_that_was_withheld_is_one_rows_failure() -> None:
    reply = choices("One.", None, "Three.", end_1="content_filter")
    with endpoint(lambda number, body: reply) as server:
        first, second, third = ask(server.url, ["Hi"] * 3)
    assert (first.text, third.text) == ("One.", "Three.")
    assert isinstance(second, RowError) and second.cause == "content filter"
    assert first.prompt_tokens + third.prompt_tokens == 5


def test_an_answer_with_half_a_surrogate_pair_can_be_sent_back() -> None:
    async def main(url: str) -> str:
        engine, messages = OpenAIEngine(OpenAISettings(model="peer", base_url=url)), [user("Hi")]
        first = await engine.answer(messages, SAMPLING)
        await engine.answer([*messages, assistant(first.text), user("And?")], SAMPLING)
        return first.text

    with endpoint(lambda number, body: Answer(200, completion("Cut \ud83d"))) as server:
        assert asyncio.run(main(server.url)) == "Cut ?"
    assert server.bodies[1]["messages"][1]["content"] == "Cut ?"


def test_a_choice_without_text_is_asked_again_alone() -> None:
    replies = [choices("One.", None, "Three."), choices("Two.")]
    with endpoint(lambda number, body: replies[number]) as server:
        assert [r.text for r in ask(server.url, ["Hi"] * 3)] == ["One.", "Two.", "Three."]
    assert [body.get("n") for body in server.bodies] == [3, None]


def test_the_first_usable_of_too_many_choices_is_taken() -> None:
    with endpoint(lambda number, body: choices(None, "Two.", "Three.")) as server:
        [reply] = ask(server.url, ["Hi"])
    assert (reply.text, reply.prompt_tokens, len(server.bodies)) == ("Two.", 5, 1)


def test_an_error_of_a_shared_request_fails_each_row() -> None:
    too_long = error(400, "The prompt is too long.", code="context_length_exceeded")
    with endpoint(lambda number, body: too_long) as server:
        outcomes = ask(server.url, ["Hi"] * 3)
    assert [outcome.cause for outcome in outcomes] == ["too long"] * 3
    assert len(server.bodies) == 1


class Killed(Exception):
    pass


class NeverSettles:
    """A governor that is killed whenever it should settle."""

    async def reserve(self, stage: str, model: str, requests: list[Usage]) -> list[str]:
        return ["ticket"] * len(requests)

    async def settle(self, *end: Any) -> None:
        raise Killed


def test_an_answer_is_in_the_log_before_its_cost_is_settled(tmp_path: Path) -> None:
    async def main(url: str, meter: Meter | None) -> list[Any]:
        log = AnswerLog(tmp_path, seed=0)
        log.refresh()
        model = Model("m", OpenAISettings(model="peer", base_url=url), answers=log, meter=meter)
        engine = model.settings.start(seed=0)
        rows = (engine.ask_for(model, {"id": name}) for name in ("one", "two"))
        answers = (row([user("Hi")], max_tokens=40) for row in rows)
        return await asyncio.gather(*answers, return_exceptions=True)

    with provider() as server:
        killed = asyncio.run(main(server.url, Meter(NeverSettles(), "stage", "m")))
        assert [type(answer) for answer in killed] == [Killed, Killed]
        answers = asyncio.run(main(server.url, None))
    assert len({answer.text for answer in answers}) == 2
    assert counts(server) == [2]


def test_rows_with_one_key_share_one_answer(tmp_path: Path) -> None:
    """As the rows of `feedback` do, whose sample is 0, if they show equal answers to one prompt."""

    async def main(url: str) -> list[str]:
        model = Model(
            "m", OpenAISettings(model="peer", base_url=url), answers=AnswerLog(tmp_path, seed=0)
        )
        engine = model.settings.start(seed=0)

        async def ask(name: str, sample: int) -> str:
            row_ask = engine.ask_for(model, {"id": name, "sample": sample})
            return (await row_ask([user("Hi")], max_tokens=40)).text

        together = await asyncio.gather(ask("a", 0), ask("b", 0), ask("c", 1), ask("d", 0))
        return [*together, await ask("e", 0)]

    with provider() as server:
        a, b, c, d, e = asyncio.run(main(server.url))
    assert a == b == d == e != c
    assert counts(server) == [2] and len(list(tmp_path.iterdir())) == 1


# --- answers that follow a schema ----------------------------------------------------------------


def test_a_schema_of_an_object_becomes_the_response_format() -> None:
    with provider() as server:
        [reply] = ask(server.url, ["Hi"], Sampling(0, 1, 40, OBJECT))
    assert 1 <= json.loads(reply.text)["score"] <= 5
    assert server.bodies[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": OBJECT},
    }


@pytest.mark.parametrize("name", ["structured_outputs", "response_format", "guided_json"])
def test_a_format_that_the_recipe_states_replaces_the_schema(name: str) -> None:
    with provider() as server:
        ask(server.url, ["Rate it."], Sampling(0, 1, 40, OBJECT), parameters={name: "ours"})
    sent = {"response_format", "structured_outputs", "guided_json"} & server.bodies[0].keys()
    assert sent == {name} and server.bodies[0][name] == "ours"


def test_another_schema_is_not_sent() -> None:
    schema = {"type": "array", "items": OBJECT}
    with provider() as server:
        ask(server.url, ["Hi"], Sampling(0, 1, 40, schema))
    assert "response_format" not in server.bodies[0]


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "This response_format type is unavailable now"),
        error(
            400,
            "Invalid schema for response_format 'answer': In context=(), 'additionalProperties' is "
            "required to be supplied and to be false.",
            param="response_format",
        ),
        error(400, "Unsupported parameter: 'response_format'", code="unsupported_parameter"),
    ],
)
def test_an_endpoint_without_schemas_is_asked_without(refusal: Answer) -> None:
    reply = Answer(200, completion('{"score": 3}'))
    with endpoint(lambda _, body: refusal if "response_format" in body else reply) as server:
        [first] = ask(server.url, ["Hi"], Sampling(0, 1, 40, OBJECT))
    assert first.text == '{"score": 3}'
    assert ["response_format" in body for body in server.bodies] == [True, False]
