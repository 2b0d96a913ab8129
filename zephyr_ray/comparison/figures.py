"""Gathers the figures of runs side by side, from what their stages contribute to a report.

A new kind of measurement therefore needs no change here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from zephyr_ray.comparison.runs import Run, is_shared, stages_of
from zephyr_ray.report.chapters import last_first
from zephyr_ray.section import (
    Bars,
    Block,
    Cell,
    Column,
    Curve,
    Curves,
    Interval,
    Pair,
    Place,
    Table,
)

RUN = "Run"
"""Heading of the column that names the run."""
ALL = "all"
"""Label in place of a run's if all runs share the artifact."""

Row = tuple[Cell, ...]
Name = tuple[str, int]
"""Name of a row or column, and the number of earlier ones with the same name, such as rows of
several tasks for the same two models."""


@dataclass
class _Merged:
    """The tables of one stage that have the same title, merged."""

    columns: dict[Name, Column] = field(default_factory=dict)
    """All columns but the first."""
    rows: dict[Name, dict[str, dict[Name, Cell]]] = field(default_factory=dict)
    """Cells by row, run and column."""
    pairs: set[Pair] = field(default_factory=set)
    """Names of rows of differences, in the direction of the first run that has them."""

    def align(self, row: Row, columns: Sequence[Column]) -> Row:
        """Returns a row of differences, reversed if an earlier run has the opposite pair; any other
        row unchanged."""
        pair, *cells = row
        if not isinstance(pair, Pair):
            return row
        opposite = Pair(pair.b, pair.a)
        if opposite not in self.pairs:
            self.pairs.add(pair)
            return row
        sides = zip(cells, columns[1:], strict=True)
        return opposite, *(_negate(cell) if column.signed else cell for cell, column in sides)


def compare_figures(runs: Sequence[Run]) -> list[Block]:
    """Returns plots and tables of the results of all stages, with the runs side by side. Stages are
    in the order of a report's results."""
    originals = {name: original for run in runs for name, original in run.originals.items()}
    blocks: list[Block] = []
    for stage in last_first(stages_of(runs), originals):
        contributed = _contributed(runs, stage, Place.RESULT)
        blocks += _bars(stage, contributed)
        blocks += _tables(stage, contributed)
    return blocks


def compare_curves(runs: Sequence[Run]) -> list[Curves]:
    """Returns the curves that several runs have, except those of artifacts that all share."""
    curves: dict[str, list[tuple[str, tuple[tuple[float, float], ...]]]] = {}
    for stage in stages_of(runs):
        for label, blocks in _contributed(runs, stage, Place.PROCESS).items():
            for block in blocks:
                if isinstance(block, Curve):
                    series = curves.setdefault(f"{stage}: {block.title}", [])
                    series.append((label, block.points))
    return [Curves(title, tuple(lines)) for title, lines in curves.items() if len(lines) > 1]


def _contributed(runs: Sequence[Run], stage: str, last: Place) -> dict[str, list[Block]]:
    """Returns the blocks of a stage in chapters up to a place, by run, or once under ALL if all
    runs share the artifact."""
    blocks = {
        run.label: [
            block
            for chapter in run.sections[stage].chapters
            if chapter.place <= last
            for block in chapter.blocks
        ]
        for run in runs
        if stage in run.sections
    }
    if len(blocks) == len(runs) and is_shared([run.artifacts[stage] for run in runs]):
        return {ALL: next(iter(blocks.values()))}
    return blocks


def _bars(stage: str, contributed: dict[str, list[Block]]) -> Iterator[Bars]:
    """Yields one plot per title; bars with the same name are next to each other, one per run."""
    merged: dict[str, dict[str, dict[str, Interval]]] = {}
    lines: dict[str, float | None] = {}
    for label, blocks in contributed.items():
        for block in blocks:
            if isinstance(block, Bars):
                lines.setdefault(block.title, block.line)
                for name, interval in block.bars:
                    merged.setdefault(block.title, {}).setdefault(name, {})[label] = interval
    for title, names in merged.items():
        bars = [
            (f"{name} · {label}", interval, label)
            for name, by_run in names.items()
            for label, interval in by_run.items()
        ]
        yield Bars(
            f"{stage}: {title}",
            tuple((name, interval) for name, interval, _ in bars),
            lines[title],
            series=tuple(label for *_, label in bars),
        )


def _tables(stage: str, contributed: dict[str, list[Block]]) -> Iterator[Table]:
    """Yields one table per title; rows with the same name are below each other, one per run."""
    merged: dict[str, _Merged] = {}
    firsts: dict[str, Table] = {}
    for label, blocks in contributed.items():
        for block in blocks:
            if isinstance(block, Table):
                firsts.setdefault(block.title, block)
                into = merged.setdefault(block.title, _Merged())
                headings = list(_number(column.heading for column in block.columns[1:]))
                for heading, column in zip(headings, block.columns[1:], strict=True):
                    into.columns.setdefault(heading, column)
                aligned = [into.align(row, block.columns) for row in block.rows]
                names = _number(str(row[0]) for row in aligned)
                for name, (_, *cells) in zip(names, aligned, strict=True):
                    values = dict(zip(headings, cells, strict=True))
                    into.rows.setdefault(name, {})[label] = values
    for title, table in merged.items():
        rows = (
            (name, label, *(values.get(heading) for heading in table.columns))
            for (name, _), by_run in table.rows.items()
            for label, values in by_run.items()
        )
        first = firsts[title]
        yield replace(
            first,
            columns=(first.columns[0], Column(RUN), *table.columns.values()),
            rows=tuple(rows),
            title=f"{stage}: {title}" if title else stage,
        )


def _negate(cell: Cell) -> Cell:
    """Returns a difference in the opposite direction; text and unknown values stay as they are."""
    match cell:
        case Interval():
            return Interval(-cell.value, -cell.high, -cell.low)
        case int() | float():
            return -cell
    return cell


def _number(names: Iterable[str]) -> Iterator[Name]:
    seen: Counter[str] = Counter()
    for name in names:
        yield name, seen[name]
        seen[name] += 1
