"""Tests the outcome of each exception of a row program, and when the actor stops."""

import asyncio
import gc
import json
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Answer, completion, endpoint

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent, RowError, Temporary
from zephyr_ray.messages import user
from zephyr_ray.models.contract import StopRun
from zephyr_ray.outcomes import (
    Answered,
    EngineDied,
    EnvironmentFault,
    Outcome,
    RowFault,
    Stopped,
    from_entry,
    to_entry,
)
from zephyr_ray.row_actor import FAULTS_IN_SUCCESSION, ROW_DEATHS, RowActor
from zephyr_ray.store import Journal

GOOD = None
BUSY = Temporary("busy")
FILTERED = RowError("status 400: flagged", "content filter")


def run(
    folder: Path,
    *ends: Exception | None,
    max_failed: int = 99,
    concurrency: int = 1,
    **attempt: Any,
) -> list[Outcome | None]:
    """Runs one row per end: an exception, or None for an answer. Returns the journal's outcomes."""

    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if end := ends[int(row["id"])]:
            raise end
        return row

    model = Model("m", RulesSettings(concurrency=concurrency))
    actor = RowActor(program, {"m": model}, 0, str(folder), max_failed, **attempt)
    rows = [json.dumps({"id": str(number)}) for number in range(len(ends))]
    asyncio.run(actor({"row": rows}))
    return [from_entry(entry) for entry in Journal(folder).read_new()]


def test_the_outcomes_of_a_block_are_on_the_storage_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    run(tmp_path, GOOD, GOOD)
    assert [text.count('"row"') for text in flushed] == [2]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_blocks_share_the_rows_in_flight(concurrency: int, tmp_path: Path) -> None:
    running, most = set[str](), 0

    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        nonlocal most
        running.add(row["id"])
        most = max(most, len(running))
        await asyncio.sleep(0.001)
        running.discard(row["id"])
        return row

    async def main() -> None:
        model = Model("m", RulesSettings(concurrency=concurrency))
        actor = RowActor(program, {"m": model}, 0, str(tmp_path), max_failed=0)
        rows = [[json.dumps({"id": f"{block}{n}"}) for n in range(5)] for block in "ab"]
        await asyncio.gather(*(actor({"row": block}) for block in rows))

    asyncio.run(main())
    answers = [from_entry(entry).id for entry in Journal(tmp_path).read_new()]
    assert most == concurrency
    assert sorted(answers) == [f"{block}{n}" for block in "ab" for n in range(5)]


@pytest.mark.parametrize("count", [1, 4])
def test_concurrency_limits_the_requests_and_more_rows_wait(count: int, tmp_path: Path) -> None:
    """Each row sends two requests at the same time."""
    lock, full, at_once = threading.Lock(), threading.Event(), [0]
    started, most_rows, most_requests = set[str](), 0, 0

    def reply(*_: Any) -> Answer:
        nonlocal most_requests
        with lock:
            at_once[0] += 1
            most_requests = max(most_requests, at_once[0])
            if most_requests == count:
                full.set()
        full.wait(60)
        full.set()  # a limit that is too low costs the test one wait
        time.sleep(0.05)  # one request too many would arrive
        with lock:
            at_once[0] -= 1
        return Answer(200, completion())

    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        nonlocal most_rows
        started.add(row["id"])
        most_rows = max(most_rows, len(started))
        prompts = ([user(f"{row['id']} {number}")] for number in range(2))
        await asyncio.gather(*(ask(prompt, max_tokens=8) for prompt in prompts))
        started.discard(row["id"])
        return row

    with endpoint(reply) as server:
        model = Model("m", OpenAISettings(model="p", base_url=server.url, concurrency=count))
        actor = RowActor(program, {"m": model}, 0, str(tmp_path), max_failed=0)
        asyncio.run(actor({"row": [json.dumps({"id": f"{n}"}) for n in range(10)]}))
    assert len(server.bodies) == 20
    assert (most_requests, most_rows) == (count, int(1.5 * count))


def test_answered_rows_of_a_block_do_not_run_again_whoever_ran_them(tmp_path: Path) -> None:
    asked: list[str] = []

    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        asked.append(row["id"])
        return row

    async def main() -> None:
        actor = RowActor(program, {"m": Model("m", RulesSettings())}, 0, str(tmp_path), 0)
        block = {"row": [json.dumps({"id": f"{n}"}) for n in range(3)]}
        Journal(tmp_path, writer="dead").append(to_entry(answered(1)))
        await actor(block)
        await actor(block)
        assert asked == ["0", "2"]
        Journal(tmp_path, writer="dead").append(to_entry(answered(3)))
        await actor({"row": [json.dumps({"id": "3"}), json.dumps({"id": "4"})]})

    asyncio.run(main())
    assert asked == ["0", "2", "4"]


def test_a_crash_that_another_block_reads_about_reruns_no_row(tmp_path: Path) -> None:
    asked: list[str] = []

    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        asked.append(row["id"])
        await asyncio.sleep(0.01)
        return row

    async def main() -> None:
        model = Model("m", RulesSettings(concurrency=4))
        actor = RowActor(program, {"m": model}, 0, str(tmp_path), 0)
        first = asyncio.ensure_future(actor({"row": ['{"id": "0"}', '{"id": "1"}']}))
        await asyncio.sleep(0)
        Journal(tmp_path, writer="dead").append(to_entry(EngineDied(["0"])))
        await actor({"row": ['{"id": "2"}']})
        await first

    asyncio.run(main())
    assert sorted(asked) == ["0", "1", "2"]


def test_nothing_holds_an_actor_after_its_pass(tmp_path: Path) -> None:
    """The garbage collector skips reference cycles that were frozen with an engine."""
    gc.disable()
    try:
        actor = RowActor(
            program_of_nothing, {"m": Model("m", RulesSettings())}, 0, str(tmp_path), 0
        )
        asyncio.run(actor({"row": ['{"id": "0"}']}))
        actor.close()
        alive = weakref.ref(actor)
        del actor
        assert alive() is None
    finally:
        gc.enable()


async def program_of_nothing(row: dict[str, Any], ask: Any) -> dict[str, Any]:
    return row


def answered(number: int) -> Answered:
    return Answered(str(number), {"id": str(number)})


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (GOOD, answered(0)),
        (FILTERED, RowFault("0", "status 400: flagged", "content filter")),
        (RowError("no"), RowFault("0", "no", "unusable")),
        (BUSY, EnvironmentFault("0", "busy")),
        (KeyError("text"), EnvironmentFault("0", "KeyError: 'text'")),
        (TimeoutError(), EnvironmentFault("0", "TimeoutError: ")),
        (StopRun("no credits"), Stopped("no credits")),
        (Permanent("no form 'x'"), Stopped("row '0': no form 'x'")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exception_decides_the_outcome(
    end: Exception | None, outcome: Outcome, tmp_path: Path
) -> None:
    assert run(tmp_path, end) == [outcome]


@pytest.mark.parametrize("error", [StopRun("no credits"), Permanent("no form")])
def test_an_error_that_affects_every_row_stops_at_once(error: Exception, tmp_path: Path) -> None:
    outcomes = run(tmp_path, GOOD, error, GOOD, GOOD)
    assert outcomes[0] == answered(0) and len(outcomes) == 2
    assert isinstance(outcomes[1], Stopped)


def test_rows_in_flight_at_a_stop_are_kept(tmp_path: Path) -> None:
    outcomes = run(tmp_path, StopRun("no credits"), GOOD, GOOD, GOOD, concurrency=3)
    assert outcomes == [Stopped("no credits"), answered(1), answered(2)]


@pytest.mark.parametrize("fault", [BUSY, ValueError("bug")])
def test_environment_faults_in_succession_stop(fault: Exception, tmp_path: Path) -> None:
    outcomes = run(tmp_path, *[fault] * 50)
    assert len(outcomes) == FAULTS_IN_SUCCESSION + 1 == 4
    assert isinstance(outcomes[-1], Stopped)
    assert outcomes[-1].stop.startswith("3 rows in succession were not answered; the last: ")


def test_faults_between_answers_do_not_stop(tmp_path: Path) -> None:
    outcomes = run(tmp_path, *[GOOD, BUSY, BUSY] * 5, GOOD)
    assert sum(isinstance(o, Answered) for o in outcomes) == 6
    assert sum(isinstance(o, EnvironmentFault) for o in outcomes) == 10
    assert len(outcomes) == 16


def test_row_faults_do_not_count_as_answers_between_environment_faults(tmp_path: Path) -> None:
    outcomes = run(tmp_path, *[BUSY, FILTERED] * 10)
    assert isinstance(outcomes[-1], Stopped) and len(outcomes) == 6


@pytest.mark.parametrize("max_failed", [0, 2])
def test_failures_above_the_limit_stop(max_failed: int, tmp_path: Path) -> None:
    outcomes = run(tmp_path, *[GOOD, FILTERED] * 10, max_failed=max_failed)
    failed = [outcome for outcome in outcomes if isinstance(outcome, RowFault)]
    assert len(failed) == max_failed + 1 and len(outcomes) == 2 * len(failed)


def test_failures_before_a_restart_of_the_actor_count(tmp_path: Path) -> None:
    run(tmp_path, FILTERED, FILTERED, GOOD, max_failed=2)
    outcomes = run(tmp_path, FILTERED, FILTERED, GOOD, GOOD, FILTERED, GOOD, max_failed=2)
    # The third failure stops the actor, so row 5 does not run.
    assert {o.id for o in outcomes if isinstance(o, RowFault)} == {"0", "1", "4"}
    assert {o.id for o in outcomes if isinstance(o, Answered)} == {"2", "3"}


def position(folder: Path) -> dict[Path, int]:
    journal = Journal(folder)
    list(journal.read_new())
    return journal.position


def test_failures_of_an_earlier_attempt_count(tmp_path: Path) -> None:
    outcomes = run(tmp_path, FILTERED, GOOD, max_failed=2, failed=["8", "9"])
    assert [o.id for o in outcomes if isinstance(o, RowFault)] == ["0"] and len(outcomes) == 1


def test_failures_that_an_attempt_forgot_are_retried(tmp_path: Path) -> None:
    run(tmp_path, FILTERED, FILTERED, max_failed=1)
    outcomes = run(tmp_path, GOOD, GOOD, max_failed=0, since=position(tmp_path))
    assert [o for o in outcomes if isinstance(o, Answered)] == [answered(0), answered(1)]


def die(folder: Path, *dead: str) -> None:
    journal = Journal(folder, writer="dead")
    for _ in range(ROW_DEATHS):
        journal.append(to_entry(EngineDied(list(dead))))


def test_a_row_at_which_the_engine_keeps_dying_is_left_to_the_next_attempt(tmp_path: Path) -> None:
    die(tmp_path, "0")
    Journal(tmp_path, writer="beside").append(to_entry(EngineDied(["0", "1"])))
    outcomes = [o for o in run(tmp_path, BUSY, GOOD, GOOD) if not isinstance(o, EngineDied)]
    left = EnvironmentFault("0", "the engine died 3 times while this row was in flight")
    assert outcomes == [answered(2), left, answered(1)]


def test_deaths_of_earlier_attempts_do_not_count(tmp_path: Path) -> None:
    die(tmp_path, "0")
    outcomes = run(tmp_path, GOOD, since=position(tmp_path))
    assert [o for o in outcomes if not isinstance(o, EngineDied)] == [answered(0)]


class DoesNotStart(RulesSettings):
    def start(self, seed: int) -> Any:
        raise ValueError("the weights are corrupt")


def test_an_engine_that_does_not_start_stops_with_its_reason(tmp_path: Path) -> None:
    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        return row

    actor = RowActor(program, {"m": Model("m", DoesNotStart())}, 0, str(tmp_path), 1)
    asyncio.run(actor({"row": ['{"id": "0"}']}))
    reason = "the engine of model 'm' did not start: ValueError: the weights are corrupt"
    assert [from_entry(e) for e in Journal(tmp_path).read_new()] == [Stopped(reason)]
