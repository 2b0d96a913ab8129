"""Tests outcomes in the journal: which rows are kept, dropped, and asked again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from in_process import work_on

from zephyr_ray import rows
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent
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
from zephyr_ray.rows import _Outcomes
from zephyr_ray.stage import Work
from zephyr_ray.store import Journal

OUTCOMES: list[Outcome] = [
    Answered("r", {"id": "r", "text": "a"}),
    RowFault("r", "9 tokens do not fit", "too long"),
    EnvironmentFault("r", "busy"),
    EngineDied(["r", "s"]),
    Stopped("wrong key"),
]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: type(outcome).__name__)
def test_an_outcome_is_read_as_it_was_written(outcome: Outcome) -> None:
    assert from_entry(to_entry(outcome)) == outcome


def test_the_format_of_entries() -> None:
    assert [to_entry(outcome) for outcome in OUTCOMES] == [
        {"id": "r", "row": {"id": "r", "text": "a"}},
        {"id": "r", "row_fault": "9 tokens do not fit", "cause": "too long"},
        {"id": "r", "environment_fault": "busy"},
        {"died": ["r", "s"]},
        {"stop": "wrong key"},
    ]


OLD_FAULTS = [
    {"id": "r", "error": "the engine refused it"},
    {"id": "r", "error": "temporary: 503"},
    {"id": "r", "row_fault": "status 402: no credits"},
    {"id": "r"},
    {},
]


@pytest.mark.parametrize("old", OLD_FAULTS)
def test_an_entry_in_another_format_is_ignored(old: dict[str, Any]) -> None:
    assert from_entry(old) is None


def read_outcomes(folder: Path, *entries: dict[str, Any]) -> _Outcomes:
    journal = Journal(folder, writer="actor")
    for one in entries:
        journal.append(one)
    read_back = _Outcomes(Journal(folder))
    read_back.follow()
    return read_back


@pytest.mark.parametrize("old", OLD_FAULTS)
def test_a_row_with_an_old_fault_is_asked_again(old: dict[str, Any], tmp_path: Path) -> None:
    answered = {"id": "kept", "row": {"id": "kept", "text": "a"}}
    read_back = read_outcomes(tmp_path, answered, old)
    assert read_back.has("kept") and read_back.results == {"kept": answered["row"]}
    assert not read_back.has("r") and read_back.count == 1
    assert (read_back.row_faults, read_back.environment_faults, read_back.stops) == ({}, {}, [])


def to_entries(*outcomes: Outcome) -> list[dict[str, Any]]:
    return [to_entry(outcome) for outcome in outcomes]


A, B = Answered("r", {"id": "r", "n": 1}), Answered("r", {"id": "r", "n": 2})
ROW, ENVIRONMENT = RowFault("r", "9 tokens do not fit", "too long"), EnvironmentFault("r", "busy")


@pytest.mark.parametrize(
    ("outcomes", "results", "row_faults", "environment_faults"),
    [
        ([A], {"r": A.row}, {}, {}),
        ([A, B], {"r": A.row}, {}, {}),  # the first answer is kept
        ([ROW, A], {"r": A.row}, {}, {}),
        ([A, ROW], {"r": A.row}, {}, {}),
        ([ENVIRONMENT, A], {"r": A.row}, {}, {}),
        ([A, ENVIRONMENT], {"r": A.row}, {}, {}),
        ([ENVIRONMENT, ROW], {}, {"r": ROW}, {}),
        ([ROW, ENVIRONMENT], {}, {"r": ROW}, {}),
        ([ENVIRONMENT], {}, {}, {"r": "busy"}),
        ([EngineDied(["r"])], {}, {}, {}),
    ],
)
def test_the_result_of_a_row_with_several_outcomes(
    outcomes: list[Outcome],
    results: dict[str, Any],
    row_faults: dict[str, RowFault],
    environment_faults: dict[str, str],
    tmp_path: Path,
) -> None:
    read_back = read_outcomes(tmp_path, *to_entries(*outcomes))
    assert (read_back.results, read_back.row_faults, read_back.environment_faults) == (
        results,
        row_faults,
        environment_faults,
    )
    assert read_back.has("r") == bool(results or row_faults)


def test_an_attempt_retries_what_stopped_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops: list[list[str]] = []

    def execute(work: Any, outcomes: _Outcomes, pending: Any, program: Any, members: Any) -> None:
        work.journal("rows", "actor").append(to_entry(A))
        outcomes.follow()
        stops.append(outcomes.stops)

    monkeypatch.setattr(rows, "_execute", execute)
    work = work_on(tmp_path)
    work.journal("rows", "earlier").append(to_entry(Stopped("wrong key")))
    models = [Model("m", RulesSettings())]
    assert rows.run_rows(work, [{"id": "r"}], None, models) == [A.row]  # type: ignore[arg-type]
    assert stops == [[]]


def test_a_line_that_a_kill_cut_short_is_ignored(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writer="actor")
    journal.append(to_entry(A))
    (tmp_path / "killed.jsonl").write_bytes(b'\n{"id": "s", "row": {"id"')
    read_back = _Outcomes(Journal(tmp_path))
    read_back.follow()
    assert read_back.results == {"r": A.row}
    assert not read_back.has("s")


def failures(numbers: Iterable[int]) -> list[dict[str, Any]]:
    causes = ("too long", "content filter")
    return [to_entry(RowFault(str(n), f"reason {n}", causes[n % 2])) for n in numbers]


@pytest.mark.parametrize(
    ("rows_in_stage", "max_failed", "allowed"),
    [(100, 0.05, 5), (12, 0.05, 1), (2, 0.05, 1), (100, 0.29, 29), (100, 0, 0), (12, 1, 11)],
)
def test_the_limit_on_failed_rows(
    rows_in_stage: int,
    max_failed: float,
    allowed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def execute(work: Work, outcomes: _Outcomes, pending: list[Any], *_: Any) -> None:
        """Fails the first `failing[0]` rows; answers the others."""
        journal, numbers = work.journal("rows", "actor"), [int(row["id"]) for row in pending]
        for entry in failures(n for n in numbers if n < failing[0]):
            journal.append(entry)
        for n in numbers:
            if n >= failing[0]:
                journal.append(to_entry(Answered(str(n), {"id": str(n)})))
        outcomes.follow()

    monkeypatch.setattr(rows, "_execute", execute)
    models, failing = [Model("m", RulesSettings())], [0]

    def run(failed: int) -> tuple[Work, list[dict[str, Any]]]:
        folder = tmp_path / str(failed)
        folder.mkdir()
        work = work_on(folder)
        work.max_failed = max_failed
        ids, failing[0] = [{"id": str(n)} for n in range(rows_in_stage)], failed
        return work, rows.run_rows(work, ids, None, models)  # type: ignore[arg-type]

    work, results = run(allowed)
    assert len(results) == rows_in_stage - allowed
    assert work.counts["failed/rows"] == allowed
    assert work.counts.get("failed/too long", 0) == (allowed + 1) // 2
    assert work.counts.get("failed/content filter", 0) == allowed // 2
    with pytest.raises(Permanent) as raised:
        run(allowed + 1)
    if allowed + 1 == rows_in_stage:
        assert (
            str(raised.value)
            == "every row failed; the first: reason 0; correct that, then run again"
        )
    else:
        assert f"{allowed + 1} of {rows_in_stage} rows failed" in str(raised.value)
        assert "row '0': reason 0; " in str(raised.value)
        assert str(raised.value).endswith("to go on without them, or run again to retry them")


def test_max_failed_is_a_share_of_all_rows_even_if_a_stage_adds_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_execute", lambda *_: None)
    models, work = [Model("m", RulesSettings())], work_on(tmp_path)
    journal, ids = work.journal("rows", "actor"), [{"id": str(n)} for n in range(40)]
    for start in (0, 20):
        journal.append(failures([start])[0])
        for row in ids[start + 1 : start + 20]:
            journal.append(to_entry(Answered(row["id"], row)))
        asked = ids[: start + 20]
        assert len(rows.run_rows(work, asked, None, models)) == 0.95 * len(asked)  # type: ignore[arg-type]
    assert work.counts["failed/rows"] == 2


@pytest.mark.parametrize(("failed", "max_failed"), [(20, 1.0), (20, 0.05), (2, 0.05)])
def test_rows_that_failed_too_often_are_asked_again(
    failed: int, max_failed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def execute(work: Work, outcomes: _Outcomes, pending: list[Any], *_: Any) -> None:
        asked.append([row["id"] for row in pending])
        for row in pending:
            work.journal("rows", "again").append(to_entry(Answered(row["id"], row)))
        outcomes.follow()

    monkeypatch.setattr(rows, "_execute", execute)
    work, ids = work_on(tmp_path), [{"id": str(n)} for n in range(20)]
    work.max_failed = max_failed
    journal = work.journal("rows", "earlier")
    for entry in failures(range(failed)):
        journal.append(entry)
    for row in ids[failed:]:
        journal.append(to_entry(Answered(row["id"], row)))
    models = [Model("m", RulesSettings())]
    assert rows.run_rows(work, ids, None, models) == ids  # type: ignore[arg-type]
    assert asked == [[str(n) for n in range(failed)]] and work.counts["failed/rows"] == 0


def test_failed_rows_that_a_higher_bound_allows_are_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, ids = work_on(tmp_path), [{"id": str(n)} for n in range(20)]
    work.max_failed = 0.1
    journal = work.journal("rows", "earlier")
    for entry in failures(range(2)):
        journal.append(entry)
    for row in ids[2:]:
        journal.append(to_entry(Answered(row["id"], row)))
    monkeypatch.setattr(rows, "_execute", lambda *_: pytest.fail("a row was asked again"))
    models = [Model("m", RulesSettings())]
    assert rows.run_rows(work, ids, None, models) == ids[2:]  # type: ignore[arg-type]


def test_rows_that_an_attempt_left_without_an_outcome_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(work: Work, outcomes: _Outcomes, *_: Any) -> None:
        work.journal("rows", "actor").append(to_entry(A))
        outcomes.follow()

    monkeypatch.setattr(rows, "_execute", execute)
    ids = [{"id": "r"}, {"id": "s"}, {"id": "t"}]
    models = [Model("m", RulesSettings())]
    with pytest.raises(Permanent, match=r"2 rows have no outcome \(the first: s\); finished rows"):
        rows.run_rows(work_on(tmp_path), ids, None, models)  # type: ignore[arg-type]


def test_actors_that_run_out_of_memory_name_the_settings_to_lower() -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    failure = rows._pass_failure(OutOfMemoryError("the node is running low on memory"), "peer")
    assert "ran out of memory; lower models.peer.actors, concurrency or context" in str(failure)
    assert "died 6 times" in str(rows._pass_failure(ActorDiedError(), "peer"))
