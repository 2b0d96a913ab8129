"""Tests that the table of a run can be rebuilt from the lines printed if there is no terminal."""

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from zephyr_ray import display
from zephyr_ray.display import Display, Row, read_line, stage_table
from zephyr_ray.stage import Progress


def steps(**kinds: str) -> Any:
    return [SimpleNamespace(name=n, stage=SimpleNamespace(kind=kind)) for n, kind in kinds.items()]


def rendered(rows: dict[str, Row]) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(stage_table(rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Returns the lines printed without a terminal, where Rich assumes 80 columns."""
    output = io.StringIO()
    monkeypatch.setattr(display, "CONSOLE", Console(file=output, width=80))
    return output


def test_the_table_is_rebuilt_from_the_lines(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "QUIET_SECONDS", -1)
    clock = SimpleNamespace(monotonic=lambda: 100.0, strftime=time.strftime)
    monkeypatch.setattr(display, "time", clock)
    all_steps = steps(seeds="prompts", talks="self_refine", answers="completions", dpo="dpo")
    progress = Progress(done=120, total=400, started=40, note="4 failed, " * 9 + "x")
    with Display(all_steps) as shown:
        shown.set("seeds", "cached", "95 rows · 5 failed (too long 5) · 12 s")
        shown.set("talks", "done", "95 rows")
        shown.set("answers", "running", progress=progress)
        shown.tick("answers")
        rows: dict[str, Row] = {}
        assert all(read_line(rows, line) for line in lines.getvalue().splitlines())
        table = rendered(rows)
        shown._table()  # what a terminal shows
        assert table == rendered(shown._rows)
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["seeds", "prompts", "cached"],
        ["talks", "self_refine", "done"],
        ["answers", "completions", "running"],
        ["dpo", "dpo", "waiting"],
    ]
    assert "120/400 rows · 2.0/s · 2 min 20 s left · 4 failed" in table
    assert (rows["answers"].done, rows["answers"].total) == (120, 400)


@pytest.mark.parametrize(
    "line", ["", "noise", "12:00:00 answers", "12:00:00 loaded weights: done", "answers: done 2"]
)
def test_other_lines_of_a_log_are_not_part_of_the_table(line: str) -> None:
    rows: dict[str, Row] = {}
    assert not read_line(rows, line) and not rows


def test_an_unknown_total_is_read_as_zero() -> None:
    rows: dict[str, Row] = {}
    assert read_line(rows, "12:00:00 answers: running 7/? rows · 3 s so far")
    assert (rows["answers"].done, rows["answers"].total) == (7, 0)
