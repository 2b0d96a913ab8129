"""How rows end in the journal: what is kept, what is dropped, and what is asked again."""

from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.outcomes import (
    Answered,
    EngineDied,
    Outcome,
    RowFault,
    Stopped,
    WorldFault,
    entry,
    read,
)
from zephyr_ray.rows import _Ends
from zephyr_ray.store import Journal

OUTCOMES: list[Outcome] = [
    Answered("r", {"id": "r", "text": "a"}),
    RowFault("r", "too long"),
    WorldFault("r", "busy"),
    EngineDied(["r", "s"]),
    Stopped("wrong key"),
]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: type(outcome).__name__)
def test_an_outcome_is_read_as_it_was_written(outcome: Outcome) -> None:
    assert read(entry(outcome)) == outcome


def test_the_format_of_entries() -> None:
    assert [entry(outcome) for outcome in OUTCOMES] == [
        {"id": "r", "row": {"id": "r", "text": "a"}},
        {"id": "r", "row_fault": "too long"},
        {"id": "r", "world_fault": "busy"},
        {"died": ["r", "s"]},
        {"stop": "wrong key"},
    ]


OLD_FAULTS = [
    {"id": "r", "error": "the engine refused it"},
    {"id": "r", "error": "temporary: 503"},
    {"id": "r"},
    {},
]


@pytest.mark.parametrize("old", OLD_FAULTS)
def test_an_entry_of_another_format_says_nothing(old: dict[str, Any]) -> None:
    assert read(old) is None


def ends(folder: Path, *entries: dict[str, Any]) -> _Ends:
    journal = Journal(folder, writer="actor")
    for one in entries:
        journal.append(one)
    read_back = _Ends(Journal(folder))
    read_back.follow()
    return read_back


@pytest.mark.parametrize("old", OLD_FAULTS)
def test_a_row_with_an_old_fault_is_asked_again(old: dict[str, Any], tmp_path: Path) -> None:
    answered = {"id": "kept", "row": {"id": "kept", "text": "a"}}
    found = ends(tmp_path, answered, old)
    assert found.has("kept") and found.results == {"kept": answered["row"]}
    assert not found.has("r") and found.count == 1
    assert (found.row_faults, found.world_faults, found.stops) == ({}, {}, [])


def of(*outcomes: Outcome) -> list[dict[str, Any]]:
    return [entry(outcome) for outcome in outcomes]


A, B = Answered("r", {"id": "r", "n": 1}), Answered("r", {"id": "r", "n": 2})
ROW, WORLD = RowFault("r", "too long"), WorldFault("r", "busy")


@pytest.mark.parametrize(
    ("outcomes", "results", "row_faults", "world_faults"),
    [
        ([A], {"r": A.row}, {}, {}),
        ([A, B], {"r": A.row}, {}, {}),  # the first answer was bought first
        ([ROW, A], {"r": A.row}, {}, {}),
        ([A, ROW], {"r": A.row}, {}, {}),
        ([WORLD, A], {"r": A.row}, {}, {}),
        ([A, WORLD], {"r": A.row}, {}, {}),
        ([WORLD, ROW], {}, {"r": "too long"}, {}),
        ([ROW, WORLD], {}, {"r": "too long"}, {}),
        ([WORLD], {}, {}, {"r": "busy"}),
        ([EngineDied(["r"])], {}, {}, {}),
    ],
)
def test_the_end_of_a_row_with_several_outcomes(
    outcomes: list[Outcome],
    results: dict[str, Any],
    row_faults: dict[str, str],
    world_faults: dict[str, str],
    tmp_path: Path,
) -> None:
    found = ends(tmp_path, *of(*outcomes))
    assert (found.results, found.row_faults, found.world_faults) == (
        results,
        row_faults,
        world_faults,
    )
    assert found.has("r") == bool(results or row_faults)


def test_a_line_that_a_kill_cut_short_is_no_entry(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writer="actor")
    journal.append(entry(A))
    (tmp_path / "killed.jsonl").write_bytes(b'\n{"id": "s", "row": {"id"')
    found = _Ends(Journal(tmp_path))
    found.follow()
    assert found.results == {"r": A.row}
    assert not found.has("s")
