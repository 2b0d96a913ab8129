"""Tests how log-probabilities get from engines to judge forms and into the answer log."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Answer, completion, endpoint, error
from fake_provider import Behavior, provider

from zephyr_ray.engines import batch_api, batches
from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.language import LanguageEngine
from zephyr_ray.engines.logprobs import read_first_tokens
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAIEngine, OpenAISettings
from zephyr_ray.engines.replies import Rejected
from zephyr_ray.judges.token import read_preference
from zephyr_ray.messages import Message, user
from zephyr_ray.models.contract import Reply, Sampling, StopRun, TopLogprobs

SETTINGS = OpenAISettings(model="m", base_url="http://a/v1", temperature=0.3, top_p=0.5)
BOTH = (("A", -0.5), ("B", -1.5))


class Engine(LanguageEngine):
    """Gives its replies in order."""

    def __init__(self, *replies: Reply):
        self.replies = list(replies)
        self.seen: list[Sampling] = []

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        self.seen.append(sampling)
        return self.replies.pop(0)


def ask(engine: LanguageEngine, folder: Path | None = None, **options: Any) -> Reply:
    """Asks one question, with the log as a new process reads it."""
    log = AnswerLog(folder, seed=0) if folder else None
    if log:
        log.refresh()
    row_ask = engine.ask_for(Model("grader", SETTINGS, answers=log), {"id": "r"})
    return asyncio.run(row_ask([user("Which?")], max_tokens=1, **options))


# --- the request of a row ------------------------------------------------------------------------


def test_log_probabilities_are_requested_at_temperature_1_and_top_p_1() -> None:
    engine = Engine(Reply("A", "length", top_logprobs=BOTH), Reply("A", "length"))
    assert ask(engine, top_logprobs=5).top_logprobs == BOTH
    ask(engine)
    assert engine.seen == [Sampling(1.0, 1.0, 1, top_logprobs=5), Sampling(0.3, 0.5, 1)]


def test_a_model_that_gives_no_log_probabilities_stops_the_run() -> None:
    with pytest.raises(StopRun) as stopped:
        ask(Engine(Reply("A", "length")), top_logprobs=5)
    assert str(stopped.value) == (
        "model 'grader' gives no log-probabilities, which this form of question reads; name "
        "another judge, or use another form"
    )


def test_an_empty_answer_needs_no_log_probabilities() -> None:
    assert ask(Engine(Reply("", "stop")), top_logprobs=5) == Reply("", "stop")


# --- the answer log ------------------------------------------------------------------------------


def test_the_log_keeps_log_probabilities(tmp_path: Path) -> None:
    reply = Reply("A", "length", 5, 1, BOTH)
    assert ask(Engine(reply), tmp_path, top_logprobs=5) == reply
    assert ask(Engine(), tmp_path, top_logprobs=5) == reply


def test_answers_without_log_probabilities_are_stored_as_before(tmp_path: Path) -> None:
    reply = Reply("A", "stop", 5, 1)
    ask(Engine(reply), tmp_path)
    [path] = tmp_path.iterdir()
    fields = json.loads(path.read_text())
    assert set(fields) == {"key", "text", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert ask(Engine(), tmp_path) == reply


def test_a_logged_answer_without_log_probabilities_is_requested_again(tmp_path: Path) -> None:
    """So that a run can continue once the endpoint gives log-probabilities."""
    with pytest.raises(StopRun):
        ask(Engine(Reply("A", "length")), tmp_path, top_logprobs=5)
    reply = Reply("A", "length", top_logprobs=BOTH)
    assert ask(Engine(reply), tmp_path, top_logprobs=5) == reply


@pytest.mark.parametrize("broken", [[["A"]], [["A", -1, 2]], 5, ["A"]])
def test_a_malformed_entry_of_the_log_is_ignored(broken: Any, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 0)
    key = log.key([user("a")], Sampling(1, 1, 1), "r")
    log.append(key, Reply("A", "length", top_logprobs=broken))
    log.refresh()
    assert log.find(key) is None


# --- endpoints -----------------------------------------------------------------------------------


def first_token(text: Any, value: Any, *top: tuple[Any, Any]) -> dict[str, Any]:
    listed = [{"token": t, "logprob": v, "bytes": None} for t, v in top]
    return {"content": [{"token": text, "logprob": value, "bytes": None, "top_logprobs": listed}]}


def replied(logprobs: Any, **message: Any) -> dict[str, Any]:
    reply = completion("A", "length")
    reply["choices"][0]["logprobs"] = logprobs
    reply["choices"][0]["message"] |= message
    return reply


def ask_at(
    answer: Answer | dict[str, Any], question: str = "Which?", **settings: Any
) -> tuple[Reply, list[dict[str, Any]]]:
    reply = answer if isinstance(answer, Answer) else Answer(200, answer)
    with endpoint(lambda *_: reply) as server:
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=server.url, **settings))
        sampling = Sampling(1.0, 1.0, 1, top_logprobs=20)
        return asyncio.run(engine.answer([user(question)], sampling)), server.bodies


def test_log_probabilities_of_the_first_token_are_requested_and_read() -> None:
    reply, [body] = ask_at(replied(first_token("A", -0.5, ("A", -0.5), ("B", -1.5))))
    assert reply == Reply("A", "length", 5, 3, BOTH)
    asked = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1, "temperature": 1, "top_p": 1}
    assert body.items() >= asked.items()
    _, [body] = ask_at(replied(first_token("A", -1, ("A", -1))), parameters={"top_logprobs": 5})
    assert body["top_logprobs"] == 5


@pytest.mark.parametrize(
    ("logprobs", "tokens"),
    [
        # The sampled token is added if it is not among the most likely ones.
        (first_token("B", -4.0, ("A", -0.1)), (("A", -0.1), ("B", -4.0))),
        # Two tokens may have the same text.
        (first_token("A", -1, ("A", -1), ("A", -2)), (("A", -1.0), ("A", -2.0))),
        (first_token("A", -1, ("A", -1), ("B", -9999.0)), (("A", -1.0), ("B", -9999.0))),
        # The sampled token alone says nothing about the others.
        (first_token("A", -0.1), ()),
        (
            first_token("A", -0.1, (None, -1), ("B", "-1"), ("B", True), ("B", math.nan)),
            (("A", -0.1),),
        ),
        (
            first_token("A", -0.1, ("A", 10**400), ("A", 3.0), ("\ud83d", -1.0)),
            (("?", -1.0), ("A", -0.1)),
        ),
        (first_token("A", -1, *[("B", -1)] * 10_000), (*[("B", -1.0)] * 100, ("A", -1.0))),
        ({"content": []}, ()),
        ({"content": None}, ()),
        ({"content": [7]}, ()),
        ({"content": [{"top_logprobs": [7, []]}]}, ()),
        ({"tokens": ["A"], "token_logprobs": [-0.1]}, ()),
        ([], ()),
        (None, ()),
    ],
)
def test_valid_entries_are_read_and_others_ignored(logprobs: Any, tokens: TopLogprobs) -> None:
    assert read_first_tokens({"logprobs": logprobs}) == tokens


def test_a_token_spent_on_reasoning_is_an_answer_without_text() -> None:
    reply, _ = ask_at(replied(first_token("<think>", 0, ("<think>", 0)), content=None))
    assert reply == Reply("", "length", 5, 3, (("<think>", 0.0),))
    assert read_preference(reply.top_logprobs).says is None


@pytest.mark.parametrize(
    "refusal",
    [
        error(403, "You are not allowed to request logprobs from this model."),
        error(400, "Unsupported parameter.", param="logprobs", code="unsupported_parameter"),
        error(400, "Logprobs is not enabled for models/x"),
        error(422, "top_logprobs: Input should be less than or equal to 5"),
        error(400, "Requested sample logprobs of 20, which is greater than max allowed: 5"),
    ],
)
def test_an_endpoint_that_refuses_log_probabilities_is_a_one_line_error(refusal: Answer) -> None:
    with pytest.raises(StopRun) as stopped:
        ask_at(refusal)
    said = str(stopped.value)
    assert said.endswith("; name another judge, or use another form of question")
    assert refusal.body["error"]["message"].rstrip(".") in said and "\n" not in said


def test_an_error_that_quotes_the_row_does_not_stop_the_run() -> None:
    with pytest.raises(Rejected):
        ask_at(error(400, "Cannot answer 'what are logprobs?'"), "what are logprobs?")


def ask_together(url: str, folder: Path, batch: bool) -> list[TopLogprobs]:
    """Returns the log-probabilities of three rows, asked alone or in a batch."""

    async def main() -> list[TopLogprobs]:
        settings = OpenAISettings(model="peer", base_url=url, batch=batch)
        model = Model("m", settings, answers=AnswerLog(folder, seed=0))
        engine = settings.start(seed=0)
        asks = (engine.ask_for(model, {"id": n}) for n in range(3))
        replies = [one([user(f"{n}?")], max_tokens=1, top_logprobs=2) for n, one in enumerate(asks)]
        return [reply.top_logprobs for reply in await asyncio.gather(*replies)]

    return asyncio.run(main())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "QUIET_SECONDS", 0.03)
    monkeypatch.setattr(batch_api, "POLL_SECONDS", 0.03)


@pytest.mark.usefixtures("quick")
def test_batches_return_log_probabilities(tmp_path: Path) -> None:
    with provider() as server:
        alone, together = (
            ask_together(server.url, tmp_path / str(batch), batch) for batch in (False, True)
        )
        assert len(server.batches.all) == 1
    assert alone == together and [len(tokens) for tokens in alone] == [2, 2, 2]


@pytest.mark.usefixtures("quick")
def test_a_batch_refused_for_log_probabilities_is_a_one_line_error(tmp_path: Path) -> None:
    line = "name another judge, or use another form of question"
    refusing = Behavior(refuses=("logprobs",))
    with provider(refusing) as server, pytest.raises(StopRun, match=line):
        ask_together(server.url, tmp_path, batch=True)
