"""Shows the live table of a run: each stage waiting, cached, running, done or failed.

Without a terminal, prints a line per change; `read_line` builds the table from these lines.
"""

import logging
import re
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zephyr_ray.engines.ledger import paid_dollars
from zephyr_ray.formatting import dollars, duration, list_counts, number
from zephyr_ray.plan import Step
from zephyr_ray.stage import Progress
from zephyr_ray.store import Artifact

CONSOLE = Console(stderr=True)
COLORS = {"waiting": "dim", "cached": "cyan", "running": "bold yellow", "done": "green"}
QUIET_SECONDS = 15
"""Seconds between two progress lines without a terminal."""
LINE = re.compile(
    r"(?:\d\d:){2}\d\d (\S+): (waiting|cached|running|done|failed|interrupted)\b ?(.*)"
)
DONE_OF_TOTAL = re.compile(r"(\d+)/(\d+|\?) ")
FLAWS = {
    "truncated": "truncated",
    "unparsable": "unparsable",
    "empty": "empty",
    "both_empty": "with two empty answers",
    "short_of_count": "short of count",
}
"""Counts of flawed or missing rows that are neither failed nor dropped, and their names in a
stage's last line."""


@dataclass
class Row:
    """One stage in the table."""

    kind: str = ""
    state: str = "waiting"
    note: str = ""
    """The artifact's counts; while the stage runs, its progress."""
    done: float = 0
    total: float = 0
    """Total of the progress; 0 if unknown."""


class ConsoleHandler(logging.Handler):
    """A log handler that prints records above the table, with their colors."""

    def emit(self, record: logging.LogRecord) -> None:
        CONSOLE.print(Text.from_ansi(self.format(record)))


class Display:
    """The live table on a terminal; plain lines elsewhere (logs, Ray jobs)."""

    def __init__(self, steps: list[Step]):
        self._rows = {step.name: Row(step.stage.kind) for step in steps}
        self._progress: dict[str, Progress] = {}
        self._live = Live(console=CONSOLE, get_renderable=self._table, refresh_per_second=4)
        self._last_line_at = 0.0

    def __enter__(self) -> "Display":
        if CONSOLE.is_terminal:
            self._live.start()
        else:
            for name, row in self._rows.items():
                self._print_line(f"{name}: waiting {row.kind}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if CONSOLE.is_terminal:
            self._live.stop()

    def set(self, name: str, state: str, note: str = "", progress: Progress | None = None) -> None:
        self._rows[name].state, self._rows[name].note = state, note
        if progress:
            self._progress[name] = progress
        if not CONSOLE.is_terminal:
            self._print_line(f"{name}: {state} {note}")

    def tick(self, name: str) -> None:
        """Prints a progress line if one is due; the pipeline calls it twice per second."""
        if not CONSOLE.is_terminal and time.monotonic() - self._last_line_at > QUIET_SECONDS:
            self._print_line(f"{name}: running {_progress_text(self._progress[name])}")

    def _print_line(self, text: str) -> None:
        self._last_line_at = time.monotonic()
        # On one line, because `read_line` parses single lines.
        line = f"{time.strftime('%H:%M:%S')} {' '.join(text.split())}"
        CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        for name, progress in self._progress.items():
            row = self._rows[name]
            if row.state == "running":
                row.note, row.done, row.total = (
                    _progress_text(progress),
                    progress.done,
                    progress.total,
                )
        return stage_table(self._rows)


def stage_table(rows: dict[str, Row]) -> Table:
    """Returns the table of the stages by name."""
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "kind", "state", "", ""):
        table.add_column(heading, no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            Text(row.kind, style="dim"),
            Text(row.state, style=COLORS.get(row.state, "red")),
            ProgressBar(total=row.total or None, completed=row.done, width=24)
            if row.state == "running"
            else "",
            Text(row.note),
        )
    return table


def read_line(rows: dict[str, Row], line: str) -> bool:
    """Updates the stages from a line that a Display printed without a terminal. Returns whether it
    is one."""
    match = LINE.fullmatch(line.rstrip())
    if match is None:
        return False
    row = rows.setdefault(match[1], Row())
    row.state, row.note = match[2], match[3]
    if row.state == "waiting":
        row.kind, row.note = row.note, ""
    progress = DONE_OF_TOTAL.match(row.note)
    row.done, row.total = (
        (int(progress[1]), int(progress[2].strip("?") or 0)) if progress else (0, 0)
    )
    return True


def _progress_text(progress: Progress) -> str:
    """Formats the progress: done of total, rate, remaining time."""
    text = f"{progress.done}/{progress.total or '?'} {progress.unit}"
    seconds = time.monotonic() - progress.started
    new = progress.done - progress.resumed
    if new > 0 and seconds > 1:
        rate = new / seconds
        text += f" · {number(rate, 1)}/s" if rate >= 1 else f" · {number(seconds / new, 1)} s each"
        if progress.total > progress.done:
            text += f" · {duration((progress.total - progress.done) / rate)} left"
    else:
        text += f" · {duration(seconds)} so far"
    return text + (f" · {progress.note}" if progress.note else "")


def summarize(artifact: Artifact) -> str:
    """Returns an artifact's counts and time: 95 rows · 5 failed (too long 5) · 12 s."""
    manifest = artifact.manifest
    counts = manifest.counts
    parts = [f"{int(counts['rows'])} rows"] if "rows" in counts else []
    parts += [f"{int(counts['steps'])} steps"] if "steps" in counts else []
    for state in ("failed", "dropped"):
        by_cause = {
            name.partition("/")[2]: count
            for name, count in counts.items()
            if name.startswith(f"{state}/") and count
        }
        total = by_cause.pop("rows", 0) or sum(by_cause.values())
        listed = f" ({list_counts(by_cause)})" if by_cause else ""
        parts += [f"{int(total)} {state}{listed}"] if total else []
    parts += [f"{int(counts[name])} {text}" for name, text in FLAWS.items() if counts.get(name)]
    paid = paid_dollars(counts)
    parts += [dollars(paid)] if paid else []
    return " · ".join([*parts, duration(manifest.seconds)])
