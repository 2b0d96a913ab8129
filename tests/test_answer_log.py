"""Tests the answer log: when requests are the same, and that no answered one is sent again."""

import asyncio
import json
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.language import LanguageEngine
from zephyr_ray.engines.model import Model, RecipeModel, Weights
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Temporary
from zephyr_ray.messages import Message, assistant, user
from zephyr_ray.models.contract import Reply, Sampling, StopRun
from zephyr_ray.row_actor import RowActor
from zephyr_ray.store import Journal

SETTINGS = OpenAISettings(model="m", base_url="http://a/v1", concurrency=2)


class Counting(LanguageEngine):
    """An engine that answers 0, 1, …; raises for every request after the first `breaks_at`."""

    def __init__(self, breaks_at: int = 99):
        self.requests: list[list[Message]] = []
        self._breaks_at = breaks_at

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        if len(self.requests) == self._breaks_at:
            raise Temporary("killed")
        self.requests.append(messages)
        return Reply(str(len(self.requests) - 1), "stop", 5, 3)


def log_in(folder: Path, seed: int = 0) -> AnswerLog:
    """Opens the log as a new process does."""
    log = pickle.loads(pickle.dumps(AnswerLog(folder, seed)))
    log.refresh()
    return log


def ask(
    folder: Path, engine: Counting, row: dict[str, Any], *questions: str, seed: int = 0
) -> list[str]:
    """Asks the questions of one row, in a new process."""
    model = Model("m", SETTINGS, answers=log_in(folder, seed))
    row_ask = engine.ask_for(model, row)

    async def main() -> list[str]:
        return [(await row_ask([user(q)], max_tokens=8)).text for q in questions]

    return asyncio.run(main())


def test_an_answered_request_is_not_sent_again(tmp_path: Path) -> None:
    engine = Counting()
    assert ask(tmp_path, engine, {"id": "r"}, "a", "b") == ["0", "1"]
    assert ask(tmp_path, engine, {"id": "r"}, "b", "c", "a") == ["1", "2", "0"]
    assert [m[0]["content"] for m in engine.requests] == ["a", "b", "c"]


def test_equal_requests_of_a_row_are_samples_in_the_same_order(tmp_path: Path) -> None:
    engine = Counting()
    assert ask(tmp_path, engine, {"id": "r"}, "a", "a") == ["0", "1"]
    assert ask(tmp_path, engine, {"id": "r"}, "a", "a", "a") == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("row", "seed", "same"),
    [
        ({"id": "r", "text": "another"}, 0, True),
        ({"id": "q"}, 0, False),
        ({"id": "q", "sample": "r"}, 0, True),
        ({"id": "r", "sample": 1}, 0, False),
        ({"id": "r"}, 1, False),
    ],
)
def test_the_row_or_its_sample_and_the_seed_distinguish_equal_requests(
    row: dict[str, Any], seed: int, same: bool, tmp_path: Path
) -> None:
    engine = Counting()
    ask(tmp_path, engine, {"id": "r"}, "a")
    assert ask(tmp_path, engine, row, "a", seed=seed) == (["0"] if same else ["1"])


class Slow(LanguageEngine):
    """An engine whose answers wait for `go`; its first one is an error if `fails`."""

    def __init__(self, fails: bool):
        self.go, self.requests, self._fails = asyncio.Event(), 0, fails

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        self.requests += 1
        await self.go.wait()
        if self._fails:
            raise Temporary("no reply")
        return Reply("yes", "stop")


@pytest.mark.parametrize("fails", [False, True], ids=["cancelled", "failed"])
def test_rows_with_one_key_share_an_error_but_not_a_cancellation(
    fails: bool, tmp_path: Path
) -> None:
    """The batch of a request that failed may be under way: sending it again would pay twice."""

    async def main() -> tuple[list[Any], int]:
        engine = Slow(fails)
        model = Model("m", SETTINGS, answers=log_in(tmp_path))
        rows = [
            asyncio.create_task(
                engine.ask_for(model, {"id": name, "sample": 0})([user("a")], max_tokens=8)
            )
            for name in "abc"
        ]
        await asyncio.sleep(0)
        if not fails:
            rows[0].cancel()
        engine.go.set()
        return await asyncio.gather(*rows, return_exceptions=True), engine.requests

    outcomes, requests = asyncio.run(main())
    if fails:
        assert [str(outcome) for outcome in outcomes] == ["no reply"] * 3 and requests == 1
    else:
        assert isinstance(outcomes[0], asyncio.CancelledError) and requests == 2
        assert [reply.text for reply in outcomes[1:]] == ["yes"] * 2


ASKED = Sampling(0.7, 0.9, 8)


@pytest.mark.parametrize(
    "other",
    [
        Sampling(0.8, 0.9, 8),
        Sampling(0.7, 0.8, 8),
        Sampling(0.7, 0.9, 9),
        Sampling(0.7, 0.9, 8, {}),
        Sampling(0.7, 0.9, 8, top_logprobs=5),
    ],
)
def test_the_key_hashes_the_sampling(other: Sampling, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 0)
    assert log.key([user("a")], ASKED, "r") != log.key([user("a")], other, "r")


def test_keys_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """A changed key makes users pay for every answer again."""
    key = AnswerLog(tmp_path, 3).key([user("ä"), assistant("b")], ASKED, ["r", 1])
    assert key == GOLDEN


GOLDEN = "26680adc96e19ba7b36784d8a6c3b906c5f9b8b6893ccfa6c4eaa0c723bf7321"


def test_an_entry_that_a_kill_cut_short_is_not_an_answer(tmp_path: Path) -> None:
    engine = Counting()
    ask(tmp_path, engine, {"id": "r"}, "a", "b")
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert ask(tmp_path, engine, {"id": "r"}, "a", "b") == ["0", "2"]
    assert ask(tmp_path, engine, {"id": "r"}, "a", "b") == ["0", "2"]


def test_no_request_is_sent_if_its_answer_cannot_be_stored(tmp_path: Path) -> None:
    engine, folder = Counting(), tmp_path / "a file in place of the folder"
    folder.write_text("")
    with pytest.raises(StopRun, match=r"answers cannot be written to .* \(File exists\); make"):
        ask(folder, engine, {"id": "r"}, "a")
    assert engine.requests == []


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limits the size of this process's files; a write stops mid-line, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_answer_that_a_full_disk_cuts_short_stops_the_run(tmp_path: Path) -> None:
    log, reply = log_in(tmp_path), Reply("x" * 500, "stop")
    key = log.key([user("a")], ASKED, "r")
    with full_disk(200), pytest.raises(StopRun, match="free disk space"):
        log.append(key, reply)
    log.append(log.key([user("b")], ASKED, "r"), reply)
    good = log_in(tmp_path)
    good.append(key, reply)
    (tmp_path / good._file.name).rename(tmp_path / "0.jsonl")  # the file that is read first
    assert log_in(tmp_path).find(key) == reply


def test_a_journal_line_that_a_full_disk_cuts_short_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "w")
    with full_disk(200), pytest.raises(OSError, match="No space left"):
        journal.append({"text": "x" * 500})


def test_an_entry_of_another_format_is_not_an_answer(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 0)
    key = log.key([user("a")], ASKED, "r")
    (tmp_path / "other.jsonl").write_text(json.dumps({"key": key, "answer": "x"}) + "\n")
    log.refresh()
    assert log.find(key) is None


def test_an_answer_to_another_request_with_a_similar_key_is_not_found(tmp_path: Path) -> None:
    """The index holds only the start of a key."""
    log = AnswerLog(tmp_path, 0)
    key = log.key([user("a")], ASKED, "r")
    log.append(key[:-1] + ("0" if key[-1] != "0" else "1"), Reply("x", "stop"))
    log.refresh()
    assert log.find(key) is None


def test_a_log_reads_what_other_logs_append(tmp_path: Path) -> None:
    first, second = log_in(tmp_path), log_in(tmp_path)
    reply = Reply("text\n", "length", 7, 8)
    for number, log in enumerate((first, second, first)):
        log.append(log.key([user(str(number))], ASKED, "r"), reply)
    keys = [first.key([user(str(number))], ASKED, "r") for number in range(3)]
    for log in (first, second):
        log.refresh()
        assert [log.find(key) for key in keys] == [reply] * 3


# --- in an actor ---------------------------------------------------------------------------------


class Started(OpenAISettings):
    """Settings whose `start` returns the engine that a test made."""

    def start(self, seed: int) -> Any:
        return ENGINES[0]


ENGINES: list[Counting] = []


async def two_turns(row: dict[str, Any], ask: Any) -> dict[str, Any]:
    messages = [user(row["id"])]
    for _ in range(2):
        reply = await ask(messages, max_tokens=8)
        messages += [assistant(reply.text), user("Go on.")]
    return {"id": row["id"], "answers": [m["content"] for m in messages[1::2]]}


def attempt(folder: Path, engine: Counting, **arguments: Any) -> dict[str, Any]:
    """Runs rows a and b on a new actor; returns the new entries of the journal by row."""
    ENGINES[:] = [engine]
    journal = Journal(folder / "rows")
    list(journal.read_new())
    settings = Started(model="m", base_url="http://a/v1", concurrency=1)
    model = Model("m", settings, answers=AnswerLog(folder / "answers", 0))
    actor = RowActor(two_turns, {"m": model}, 0, str(folder / "rows"), 9, **arguments)
    asyncio.run(actor({"row": [json.dumps({"id": name}) for name in "ab"]}))
    return {entry["id"]: entry.get("row") for entry in journal.read_new()}


def test_the_first_turn_of_an_unfinished_row_is_kept(tmp_path: Path) -> None:
    broken, engine = Counting(breaks_at=3), Counting()
    assert attempt(tmp_path, broken) == {"a": {"id": "a", "answers": ["0", "1"]}, "b": None}
    assert attempt(tmp_path, engine) == {"b": {"id": "b", "answers": ["2", "0"]}}
    assert [len(messages) for messages in engine.requests] == [3]


def test_a_row_with_a_useless_result_runs_again(tmp_path: Path) -> None:
    attempt(tmp_path, Counting())
    engine = Counting()
    position = {path: path.stat().st_size for path in (tmp_path / "rows").iterdir()}
    rows = attempt(tmp_path, engine, useless={"b": 1}, since=position)
    assert [rows[name]["answers"] for name in "ab"] == [["0", "1"]] * 2
    assert [messages[0]["content"] for messages in engine.requests] == ["b", "b"]


# --- the logs of a recipe's models ---------------------------------------------------------------


def folder_of(settings: Any, **weights: Weights) -> str:
    model = RecipeModel("any name", settings, weights, {})
    return str(model.answer_log(Path("/s"), {"sft": "key"}, 0).folder)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"temperature": 0, "top_p": 1, "context": 99, "questions": "q"}, True),  # in the request
        ({"concurrency": 9, "actors": 2, "price": (1, 2), "api_key_env": "KEY"}, True),
        ({"model": "n"}, False),
        ({"base_url": "http://b/v1"}, False),
        ({"parameters": {"reasoning_effort": "low"}}, False),
    ],
)
def test_models_share_a_log_if_they_answer_alike(change: dict[str, Any], same: bool) -> None:
    assert (folder_of(SETTINGS.model_copy(update=change)) == folder_of(SETTINGS)) is same


def test_weights_have_logs_of_their_own() -> None:
    settings = VllmSettings(weights="unused")
    trained = folder_of(settings, weights=Weights("owner/a", "sft"))
    assert folder_of(settings, weights=Weights("owner/a")) != trained
