"""Compares runs on one page and in the terminal: `zephyr compare`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from zephyr_ray.comparison.differences import find_differences
from zephyr_ray.comparison.figures import RUN, compare_figures
from zephyr_ray.comparison.page import differences_table, to_section, verdict
from zephyr_ray.comparison.runs import read_runs
from zephyr_ray.errors import Permanent
from zephyr_ray.report.chapters import arrange
from zephyr_ray.report.render import Fact, cell_text, render
from zephyr_ray.section import Block, Cell, Interval, Table
from zephyr_ray.stage import Stage
from zephyr_ray.store import write_atomically


def compare(folders: Sequence[Path], out: Path, kinds: dict[str, type[Stage]]) -> int:
    """Writes the page, and prints what differs and the figures that have intervals. Returns the
    exit code; raises Permanent if a user must change something."""
    if out.suffix != ".html":
        raise Permanent(f"--out {out}: the page is HTML; name a file that ends with .html")
    if len(folders) == 1:
        raise Permanent("a comparison needs at least two runs; name another one")
    runs = read_runs(folders, kinds)
    differences = find_differences(runs)
    outcome = verdict(runs, differences)
    findings = [Fact(run.label, run.headline) for run in runs if run.headline]
    page = render(
        title=" · ".join(run.label for run in runs),
        findings=[Fact("", outcome), *findings],
        facts=[Fact(run.label, str(folder)) for run, folder in zip(runs, folders, strict=True)],
        stages=[],
        chapters=arrange({"": to_section(runs, differences)}, {}),
    )
    try:
        write_atomically(out, page)
    except OSError as error:
        raise Permanent(f"cannot write {out} ({error.strerror}); name another --out") from None
    console = Console()
    console.print(Text(outcome), soft_wrap=True)
    for table in _short_tables([differences_table(runs, differences), *compare_figures(runs)]):
        console.print()
        console.print(_to_console(table))
    console.print(f"\nwrote {out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def print_markdown(folders: Sequence[Path], kinds: dict[str, type[Stage]]) -> int:
    """Prints the figures with intervals of one or more runs as Markdown tables, for a README.
    Returns the exit code; raises Permanent if a user must change something."""
    runs = read_runs(folders, kinds)
    tables = list(_short_tables(compare_figures(runs)))
    if not tables:
        names = ", ".join(map(str, folders))
        raise Permanent(f"{names}: no figure has an interval; name a run that compares models")
    if len(runs) == 1:
        tables = [_without(RUN, table) for table in tables]
    print("\n\n".join(map(_to_markdown, tables)))
    return 0


def _without(heading: str, table: Table) -> Table:
    """Returns a table without the column of this heading."""
    kept = [i for i, column in enumerate(table.columns) if column.heading != heading]
    return _select(table, kept)


def _select(table: Table, columns: Sequence[int]) -> Table:
    return replace(
        table,
        columns=tuple(table.columns[i] for i in columns),
        rows=tuple(tuple(row[i] for i in columns) for row in table.rows),
    )


def _short_tables(blocks: Sequence[Block]) -> Iterator[Table]:
    """Yields tables with only text and interval columns; skips titled tables without intervals."""
    for block in blocks:
        if not isinstance(block, Table):
            continue
        kept = [i for i, c in enumerate(block.columns) if c.digits is None]
        kept += [i for i, _ in enumerate(block.columns) if _has_interval(block, i)]
        if block.title and not _has_interval(block, *range(len(block.columns))):
            continue
        yield _select(block, kept)


def _to_console(table: Table) -> ConsoleTable:
    shown = ConsoleTable(title=table.title or None, box=None, title_justify="left")
    for column in table.columns:
        shown.add_column(column.heading, justify="left" if column.digits is None else "right")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in _texts(table, row)))
    return shown


def _to_markdown(table: Table) -> str:
    headings = [column.heading for column in table.columns]
    lines = [headings, ["---"] * len(headings), *(_texts(table, row) for row in table.rows)]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(line)} |" for line in escaped)])


def _texts(table: Table, row: Sequence[Cell]) -> list[str]:
    return [cell_text(cell, column) for cell, column in zip(row, table.columns, strict=True)]


def _has_interval(table: Table, *columns: int) -> bool:
    return any(isinstance(row[column], Interval) for row in table.rows for column in columns)
