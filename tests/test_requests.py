"""Tests request bodies: accepted defaults, limits, and rows for the judge."""

import json
import time
from typing import Any

import pytest

from zephyr_ray.judges import FORMS
from zephyr_ray.serve.request_error import MAX_ERROR_CHARACTERS, RequestError
from zephyr_ray.serve.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    judge_request,
    parse,
)

CHAT = {"model": "dpo", "messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"model": "dpo", "prompt": "a"}
SCORE = judge_request(FORMS["score"].fields)


def refused(cls: type[Body], body: Any) -> RequestError:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        parse(cls, content)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "text"}},
        {"store": False},
        {"tool_choice": "none"},
        {"tools": []},
        {"functions": None},
        {"parallel_tool_calls": True},
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"logit_bias": {}},
        {"logprobs": False, "n": 1, "presence_penalty": 0, "stop": None, "stream": False},
        {"stream_options": {"include_obfuscation": True}},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}},
    ],
)
def test_a_field_at_its_default_is_accepted(field: dict[str, Any]) -> None:
    parse(ChatRequest, json.dumps({**CHAT, **field}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("tool_choice", "required"),
        ("tools", [{"type": "function"}]),
        ("modalities", ["audio"]),
        ("logit_bias", {"5": 1}),
        ("web_search_options", {}),
        ("top_k", 1),
    ],
)
def test_an_unsupported_field_or_value_is_refused_by_name(field: str, value: Any) -> None:
    error = refused(ChatRequest, {**CHAT, field: value})
    assert (error.param, str(error)) == (field, f"{field}: not supported here; remove it")


@pytest.mark.parametrize("stop", [5, "", [""], list("abcde"), [1], {}, "a" * 501])
def test_a_wrong_stop_names_its_limits(stop: Any) -> None:
    error = refused(ChatRequest, {**CHAT, "stop": stop})
    limits = "must be a string, or a list of at most 4 strings, each of 1 to 500 characters"
    assert (error.param, str(error)) == ("stop", f"stop: {limits}")


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1, 2], [3]], [0]])
def test_a_prompt_is_texts_or_token_ids(prompt: Any) -> None:
    body = json.dumps({**COMPLETION, "prompt": prompt}).encode()
    assert parse(CompletionRequest, body).prompt == prompt


@pytest.mark.parametrize("prompt", [None, 1, [], [[]], [-1], [2**31], ["a", 1], ["a"] * 9, {}])
def test_a_wrong_prompt_names_its_limits(prompt: Any) -> None:
    error = refused(CompletionRequest, {**COMPLETION, "prompt": prompt})
    assert "a string, a list of token IDs, or a list of 1 to 8 of either" in str(error)


def test_an_error_about_a_hostile_field_name_is_short() -> None:
    body = json.dumps({"model": "m", "prompt": "a", "z\n" * 100_000: 1}).encode()
    with pytest.raises(RequestError) as refused:
        parse(CompletionRequest, body)
    error = refused.value.body()["error"]
    assert len(json.dumps(error)) < 2000 and "\n" not in error["param"]


def test_only_an_assistant_may_have_no_content() -> None:
    def messages(role: str) -> bytes:
        return json.dumps({**CHAT, "messages": [{"role": role, "content": None}]}).encode()

    assert parse(ChatRequest, messages("assistant")).plain_messages() == [
        {"role": "assistant", "content": ""}
    ]
    assert "messages.0: content is missing" in str(refused(ChatRequest, messages("user")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**400),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("top_logprobs", 21),
        ("temperature", float("nan")),
        ("top_p", float("-inf")),
        ("presence_penalty", 2.1),
        ("messages", [{"role": "user", "content": "a"}] * 257),
        ("messages", [1] * 300_000),
        ("stop", [1] * 300_000),
        ("model", "a" * 257),
    ],
)
def test_every_number_and_list_is_bounded(field: str, value: Any) -> None:
    began = time.thread_time()
    assert refused(ChatRequest, {**CHAT, field: value}).param == field
    assert time.thread_time() - began < 5


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"n":' + b"9" * 5000 + b"}", b'{"model":"\\ud800"}', b"[1]", b"\xff", b""],
)
def test_a_body_that_is_no_json_object_is_refused_in_one_line(body: bytes) -> None:
    message = str(refused(ChatRequest, body))
    assert "\n" not in message and "ChatRequest" not in message


def test_an_error_line_does_not_grow_with_the_request() -> None:
    assert len(str(refused(ChatRequest, {**CHAT, "z" * 900_000: 1}))) == MAX_ERROR_CHARACTERS


@pytest.mark.parametrize(
    "constraint", [{"kind": "numbered", "n": 30_000_000}, {"kind": "zzz"}, {"n": [[[1]]]}]
)
def test_a_wrong_constraint_of_a_judged_prompt_is_named(constraint: dict[str, Any]) -> None:
    row = {"prompt": "a", "completion": {"text": "b"}}
    error = refused(SCORE, {"requests": [row, {**row, "constraint": constraint}]})
    assert error.param == "requests.1.constraint"


def test_a_judged_prompt_may_omit_instruction_and_constraint() -> None:
    body = {"requests": [{"prompt": "Name a pet.", "completion": {"text": "a cat"}}]}
    [rating] = parse(judge_request(FORMS["score"].fields), json.dumps(body).encode()).requests
    assert rating.row() == {
        "prompt": "Name a pet.", "instruction": "Name a pet.", "constraint": None,
    }  # fmt: skip
    assert rating.completion.model_dump() == {"text": "a cat", "finish_reason": "stop"}


def test_a_judged_prompt_keeps_its_instruction_and_constraint() -> None:
    given = {
        "prompt": "Name a pet in CAPITALS.",
        "instruction": "",
        "constraint": {"kind": "uppercase"},
    }
    body = {"requests": [{**given, "first": {"text": "A"}, "second": {"text": "B"}}]}
    [comparison] = parse(
        judge_request(FORMS["pairwise"].fields), json.dumps(body).encode()
    ).requests
    assert comparison.row() == given
    assert (comparison.first.text, comparison.second.text) == ("A", "B")


def test_answers_that_are_judged_together_are_a_list() -> None:
    aspects = judge_request(FORMS["aspects"].fields)
    row = {"prompt": "p", "order_seed": "p1", "completions": [{"text": "a"}, {"text": "b"}]}
    [judged] = parse(aspects, json.dumps({"requests": [row]}).encode()).requests
    assert judged.row() == {
        "prompt": "p", "instruction": "p", "constraint": None, "order_seed": "p1",
    }  # fmt: skip
    assert [answer["text"] for answer in judged.answers()] == ["a", "b"]
    for wrong in ([], [{"text": "a"}] * 33):
        error = refused(aspects, {"requests": [{**row, "completions": wrong}]})
        assert error.param == "requests.0.completions"


def test_answers_are_judged_in_the_order_of_the_fields() -> None:
    row = {"second": {"text": "B"}, "prompt": "p", "first": {"text": "A"}}
    body = judge_request(FORMS["pairwise"].fields)
    [judged] = parse(body, json.dumps({"requests": [row]}).encode()).requests
    assert [answer["text"] for answer in judged.answers()] == ["A", "B"]


def test_a_judge_request_has_at_most_64_rows_and_200000_characters_per_answer() -> None:
    body = judge_request(FORMS["score"].fields)

    def errors(rows: int, characters: int) -> int:
        row = {"prompt": "a", "completion": {"text": "b" * characters}}
        try:
            parse(body, json.dumps({"requests": [row] * rows}).encode())
        except RequestError as error:
            return error.status
        return 200

    assert [errors(64, 1), errors(65, 1)] == [200, 400]
    assert [errors(1, 200_000), errors(1, 200_001)] == [200, 400]
