"""Shows the live table of a run: each stage waiting, cached, running, done or failed."""

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zephyr_ray.formatting import duration
from zephyr_ray.plan import Step
from zephyr_ray.stage import Progress

CONSOLE = Console(stderr=True)
COLORS = {"waiting": "dim", "cached": "cyan", "running": "bold yellow", "done": "green"}
QUIET_SECONDS = 15
"""Seconds between two progress lines without a terminal."""


class ConsoleHandler(logging.Handler):
    """A log handler that prints records above the table, with their colors."""

    def emit(self, record: logging.LogRecord) -> None:
        CONSOLE.print(Text.from_ansi(self.format(record)))


class Display:
    """The live table on a terminal; plain lines elsewhere (logs, Ray jobs)."""

    def __init__(self, steps: list[Step]):
        self._rows = {s.name: ["waiting", s.stage.kind, ""] for s in steps}
        self._progress: dict[str, Progress] = {}
        self._live = Live(console=CONSOLE, get_renderable=self._table, refresh_per_second=4)
        self._last_line_at = 0.0

    def __enter__(self) -> "Display":
        if CONSOLE.is_terminal:
            self._live.start()
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
        self._rows[name][0], self._rows[name][2] = state, note
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
        CONSOLE.print(f"{time.strftime('%H:%M:%S')} {text.rstrip()}", highlight=False, markup=False)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("stage", "kind", "state", "", ""):
            table.add_column(heading, no_wrap=True)
        for name, (state, kind, note) in self._rows.items():
            progress = self._progress.get(name)
            running = state == "running" and progress is not None
            table.add_row(
                name,
                Text(kind, style="dim"),
                Text(state, style=COLORS.get(state, "red")),
                ProgressBar(total=progress.total or None, completed=progress.done, width=24)
                if running and progress
                else "",
                _progress_text(progress) if running and progress else Text(note),
            )
        return table


def _progress_text(progress: Progress) -> str:
    """Formats the progress: done of total, rate, remaining time."""
    text = f"{progress.done}/{progress.total or '?'} {progress.unit}"
    seconds = time.monotonic() - progress.started
    new = progress.done - progress.resumed
    if new > 0 and seconds > 1:
        rate = new / seconds
        text += f" · {rate:.1f}/s" if rate >= 1 else f" · {seconds / new:.1f} s each"
        if progress.total > progress.done:
            text += f" · {duration((progress.total - progress.done) / rate)} left"
    else:
        text += f" · {duration(seconds)} so far"
    return text + (f" · {progress.note}" if progress.note else "")
