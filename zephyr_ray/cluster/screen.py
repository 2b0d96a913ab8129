"""Shows a followed job on a terminal: the table of its stages, with its log above."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.live import Live

from zephyr_ray.display import CONSOLE, Row, read_line, stage_table
from zephyr_ray.masking import masked


def show(line: str) -> None:
    """Prints a line of the job's log."""
    print(masked(line), flush=True)


@contextmanager
def live_table() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a line of the job's log. On a terminal, lines about stages
    update the table, and other lines are printed above it."""
    if not (sys.stdout.isatty() and CONSOLE.is_terminal):
        yield show
        return
    rows: dict[str, Row] = {}

    def update(line: str) -> None:
        if not read_line(rows, masked(line)):
            show(line)

    # Live also moves whatever is printed meanwhile above the table.
    with Live(
        console=CONSOLE,
        get_renderable=lambda: stage_table(rows) if rows else "",
        refresh_per_second=4,
    ):
        yield update
