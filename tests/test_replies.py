"""Tests how a reply is classified: an answer, an error of the row, or an error of the endpoint."""

import json
import re
import time
from email.utils import formatdate
from typing import Any

import pytest
from fake_endpoint import GOOD, HTML, NO_CREDITS, Answer, completion, error

from zephyr_ray.engines.replies import Rejected, Unavailable, read_answer, read_object
from zephyr_ray.errors import Permanent, RowError, Temporary
from zephyr_ray.models.contract import Reply, StopRun


def read(answer: Answer) -> Reply:
    text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
    headers = {k.lower(): v for k, v in answer.headers.items()}
    headers["content-type"] = answer.content_type or "text/html; charset=utf-8"
    return read_answer(read_object(answer.status, headers, text, "peer"), "peer")


def refusal(answer: Answer) -> Permanent | Temporary:
    with pytest.raises((Permanent, Temporary)) as raised:
        read(answer)
    assert str(raised.value).startswith("peer: ")
    return raised.value


def choice(finish_reason: str | None = "stop", **message: Any) -> Answer:
    reply = completion(finish_reason=finish_reason)
    reply["choices"][0]["message"] |= message
    return Answer(200, reply)


def failed_choice(**why: Any) -> Answer:
    reply = completion("Half an ans", "error")
    reply["choices"][0]["error"] = why
    return Answer(200, reply)


def part(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": text}


THINKING = {"type": "thinking", "thinking": [part("Hm.")]}
"""A part of an answer of Mistral's reasoning models."""


@pytest.mark.parametrize(
    ("answer", "text", "finish_reason"),
    [
        (GOOD, "Good day.", "stop"),
        (choice("length"), "Good day.", "length"),
        (choice("eos"), "Good day.", "stop"),
        (choice("MAX_TOKENS"), "Good day.", "length"),
        (choice("stop", content=""), "", "stop"),
        (choice("length", content=None), "", "length"),
        (choice("stop", content=None, reasoning="Hm."), "", "stop"),
        (choice("stop", content=None, reasoning_content="Hm."), "", "stop"),
        (choice("stop", content=[THINKING, part("Good "), part("day.")]), "Good day.", "stop"),
        (choice("length", content=[THINKING]), "", "length"),
        (choice("stop", refusal=None), "Good day.", "stop"),
        (Answer(200, completion() | {"error": None}), "Good day.", "stop"),
        (Answer(200, json.dumps(completion()), content_type="text/plain"), "Good day.", "stop"),
    ],
)
def test_an_answer(answer: Answer, text: str, finish_reason: str) -> None:
    assert read(answer) == Reply(text, finish_reason, 5, 3)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": None}])
def test_an_answer_without_usage(usage: Any) -> None:
    assert read(Answer(200, completion() | {"usage": usage})) == Reply("Good day.", "stop")


LONG = [
    error(400, "no", code="context_length_exceeded"),
    error(400, "no", code=400, type="exceed_context_size_error"),
    error(400, "This model's maximum context length is 512 tokens. However, you requested 900"),
    error(400, "prompt is too long: 200001 tokens > 199999 maximum", type="invalid_request_error"),
    error(400, "Input is too long for requested model."),
    error(422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048"),
    Answer(400, [{"error": {"code": 400, "message": "The input token count (9) exceeds the max"}}]),
    Answer(400, {"object": "error", "code": 400, "message": "the prompt is too long"}),
    error(400, "This model's prompt has 5000 tokens, but the max is 4096"),
    error(400, "The decoder prompt (length 5000) is longer than the maximum model length of 2048."),
    error(400, "The prompt is too long; please shorten it and try again"),
    error(400, "The prompt is too long; wait, try again", code="context_length_exceeded"),
    Answer(413, "<html>Payload Too Large</html>"),
    Answer(422, {"detail": [{"type": "string_too_long", "loc": ["body", "text"], "msg": "no"}]}),
]
CONTENT = [
    error(400, "filtered due to the prompt triggering content management policy.", code="no"),
    error(400, "no", code="content_filter"),
    error(400, "no", type="content_filter", param="prompt"),
    error(400, "no", code="data_inspection_failed"),
    error(400, "Invalid prompt: your prompt was flagged as potentially violating our usage policy"),
    error(400, "Content Exists Risk", type="invalid_request_error"),
    error(400, "no", innererror={"code": "content_filter"}),
    error(403, "Your input was flagged", code=403, metadata={"flagged_input": "…"}),
    Answer(200, {"error": {"code": 403, "message": "no", "metadata": {"flagged_input": "…"}}}),
    choice("content_filter", content=None),
    choice("content_filter"),
    choice("guardrail_intervened", content=None),
    choice("CONTENT_FILTERED", content=None),
    choice("BLOCKLIST", content=None),
    choice("SPII", content=None),
    error(400, "Your request was rejected as a result of our safety system."),
    error(400, "Filtered. Please try again with another prompt", code="content_filter"),
    choice("SAFETY", content=None),
    failed_choice(code=403, message="no", metadata={"flagged_input": "…"}),
]
REFUSED = [choice("stop", content=None, refusal="I cannot help with that.")]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        *((answer, "too long") for answer in LONG),
        *((answer, "content filter") for answer in CONTENT),
        *((answer, "refused") for answer in REFUSED),
    ],
)
def test_an_error_of_the_row(answer: Answer, cause: str) -> None:
    refused = refusal(answer)
    assert isinstance(refused, RowError) and refused.cause == cause


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (error(401, "Incorrect API key", code="invalid_api_key"), "status 401: Incorrect.*api_key"),
        (Answer(401, "<html>Unauthorized</html>"), "a valid key"),
        (NO_CREDITS, "status 402: Insufficient credits; add credits"),
        (Answer(200, NO_CREDITS.body), "status 402: Insufficient credits; add credits"),
        (failed_choice(code=402, message="Insufficient credits"), "add credits"),
        (error(429, "You exceeded your current quota", code="insufficient_quota"), "add credits"),
        (error(429, "no", type="exceeded_current_quota_error"), "add credits"),
        (error(400, "API key not valid. Please pass a valid API key."), "a valid key"),
        (error(400, "Your credit balance is too low to access the API."), "add credits"),
        (error(500, "no", code="insufficient_quota"), "add credits"),
        (error(400, "no", code="billing_hard_limit_reached"), "add credits"),
        (error(403, "This key may not use it"), "use a key that has access"),
        (error(404, "The model 'm' does not exist", code="model_not_found"), "correct model"),
        (error(403, "no", code="model_not_found"), "correct model"),
        (error(400, "Invalid model: m", type="invalid_model", code="1500"), "correct model"),
        (error(400, "x/y is not a valid model ID", code=400), "correct model"),
        (error(400, "Model Not Exist", type="invalid_request_error"), "correct model"),
        (Answer(404, {"detail": "Not Found"}), "status 404: Not Found; correct model or base_url"),
        (Answer(407, ""), "password of the proxy"),
        (Answer(307, "", {"Location": "/login?token=abc"}), "redirects to /login; set base_url"),
        (
            Answer(302, "<html>Moved</html>", {"Location": "https://sso/x"}),
            "redirects to https://sso/x",
        ),
    ],
)
def test_an_error_of_every_row_stops_the_run(answer: Answer, says: str) -> None:
    stop = refusal(answer)
    assert isinstance(stop, StopRun) and re.search(says, str(stop))
    assert "token=" not in str(stop)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        *((error(status), f"status {status}: It broke") for status in (408, 409, 425, 500, 529)),
        (Answer(524, "<html>timeout</html>"), "status 524: <html>timeout"),
        (Answer(502, ""), "status 502"),
        (error(503, "The content filter is not available"), "status 503"),
        (error(500, "no", code="context_length_exceeded"), "status 500"),
        (error(400, "The content management service is unavailable"), "status 400"),
        (Answer(200, {"error": "The content filter is not available, try again"}), "try again"),
        (error(400, "Request timed out: prompt size queue is full"), "status 400"),
        (error(400, "KV cache is full: reduce the context window or wait"), "status 400"),
        (
            Answer(200, {"error": "CUDA out of memory while processing; the input size is 4"}),
            "out of memory",
        ),
        (error(400, "the content filter broke", code="model_overloaded"), "status 400"),
        (
            error(403, "All requests from your organization were flagged for unusual activity"),
            "status 403",
        ),
        (HTML, "answers text/html instead of JSON"),
        (Answer(200, '{"choices": [{"index"', content_type="application/json"), "instead of JSON"),
        (Answer(200, "data: {}\n\n", content_type="text/event-stream"), "text/event-stream"),
        (Answer(200, "[" * 100_000), "instead of JSON"),
        (Answer(204, ""), "instead of JSON"),
        (Answer(200, []), "peer"),
        (Answer(200, "null", content_type="application/json"), "instead of JSON"),
        (Answer(200, {"error": "upstream lost"}), "upstream lost"),
        (Answer(200, {"error": {"message": "no", "code": 502}}), "status 502: no"),
        (Answer(200, {"object": "error", "message": "no"}), "no"),
        (Answer(200, {"message": "hello"}), "no choice"),
        *((Answer(200, {"choices": choices}), "no choice") for choices in (None, [], {}, [None])),
        (Answer(200, {"choices": [{"finish_reason": "stop", "text": "Good day."}]}), "no choice"),
        (failed_choice(code=502, message="Provider disconnected"), "502: Provider disconnected"),
        (choice("error"), "has text and finish_reason error"),
        (choice(None), "has text and finish_reason none"),
        (choice("tool_calls", content=None), "no text and finish_reason tool_calls"),
        (choice("stop", content=None), "no text and finish_reason stop"),
        (choice("tool_calls", content=None, reasoning="Hm."), "no text and finish_reason tool"),
        *(
            (choice("stop", content=None, reasoning=reasoning), "no text and finish_reason stop")
            for reasoning in ("", None, ["Hm."])
        ),
        *(
            (choice("stop", content=content), "no text")
            for content in (
                ["Good day."],
                [],
                [part("Good day."), {"type": "image_url"}],
                [part(1)],
            )
        ),
    ],
)
def test_a_temporary_error_is_retried(answer: Answer, says: str) -> None:
    unavailable = refusal(answer)
    assert isinstance(unavailable, Unavailable) and not unavailable.rate_limited
    assert says in str(unavailable)


@pytest.mark.parametrize(
    "answer",
    [
        error(429, "Rate limit reached for requests", code="rate_limit_exceeded"),
        error(429, "You exceeded your current quota, per minute", code=429),
        Answer(200, {"error": {"message": "slow down", "code": 429}}),
        Answer(429, ""),
        error(400, "Too many tokens, please wait before trying again."),
        error(400, "Too many tokens", type="ThrottlingException"),
        error(403, "Slow down", code="rate_limit_exceeded"),
        error(
            413,
            "Request too large for model in organization `org_1` on tokens per minute (TPM): Limit "
            "6000, Requested 9000, please reduce your message size and try again.",
            type="tokens",
            code="rate_limit_exceeded",
        ),
    ],
)
def test_a_rate_limit_is_waited_out(answer: Answer) -> None:
    limit = refusal(answer)
    assert isinstance(limit, Unavailable) and limit.rate_limited


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("20", 20),
        ("1.5", 1.5),
        ("-3", 0),
        ("soon", None),
        ("nan", None),
        ("Mon, 01 Jan 99999999 00:00:00 GMT", None),
        (f"Mon, 01 Jan {9**30} 00:00:00 GMT", None),
        ("", None),
    ],
)
def test_the_delay_in_retry_after(value: str, seconds: float | None) -> None:
    limit = refusal(Answer(429, "", {"Retry-After": value}))
    assert isinstance(limit, Unavailable)
    assert limit.after == seconds


def test_the_date_in_retry_after() -> None:
    began = time.time()
    limit = refusal(Answer(429, "", {"Retry-After": formatdate(began + 30, usegmt=True)}))
    assert isinstance(limit, Unavailable) and limit.after is not None
    # The date states whole seconds.
    assert 29 - (time.time() - began) <= limit.after <= 30


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "messages: text content blocks must be non-empty"),
        error(400, "max_tokens is too large: 5000. This model supports at most 4096", param="n"),
        error(422, "Request body violates the JSON schema"),
        Answer(405, {"detail": "Method Not Allowed"}),
        Answer(403, "<html>Blocked by the firewall</html>"),
        Answer(400, "<html>400 Bad Request: Request Header Or Cookie Too Large</html>"),
        error(400, "You have reached your prompt limit for today"),
        Answer(418, {"no": "error object"}),
    ],
)
def test_an_unknown_error_leaves_the_row_to_the_next_run(answer: Answer) -> None:
    rejected = refusal(answer)
    assert isinstance(rejected, Rejected) and str(answer.status) in str(rejected)


def test_a_long_reply_is_cut_and_is_one_line() -> None:
    line = str(refusal(Answer(500, "It\x1b[31m\nbroke. " * 10_000)))
    assert len(line) < 400 and line.isprintable() and "broke" in line
