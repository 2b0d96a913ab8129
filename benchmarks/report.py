"""Writes each result at once: to standard output, table.md and results.jsonl."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contestants import GIB, Measured
from zephyr_ray.train.memory import Memory

RESERVE = 20
"""Minimum seconds for a section; with less time left, it is skipped."""
COLUMNS = (
    "training",
    "micro",
    "rows/s",
    "tokens/s",
    "s/step",
    "MFU",
    "hardware.tflops",
    "peak GiB allocated",
    "reserved",
    "on the device",
    "host",
    "planned GiB",
    "planned / on the device",
    "planned / allocated, without reserve",
    "s before step 1",
    "first and last loss",
)


class Report:
    """The table of one run, and its remaining time."""

    def __init__(self, folder: Path, budget: float):
        self.folder, self.end = folder, time.monotonic() + budget
        self.name, self.has_header = "", False

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def section(self, name: str, measure: Callable[[], Any]) -> None:
        """Runs one section; if it fails, the run continues without its result."""
        if self.left < RESERVE:
            self._write(f"skipped for lack of time: {name}")
            return
        self.name, started = name, time.monotonic()
        try:
            measure()
        except Exception as error:
            last = "\n".join(str(error).strip().splitlines()[-12:])
            self._write(f"FAILED {name}: {type(error).__name__}\n{last}")
        seconds = time.monotonic() - started
        self._record({"section": name, "seconds": round(seconds, 1), "left": round(self.left)})
        print(f"    [{name}: {seconds:.1f} s, {self.left:.0f} s left]", flush=True)

    def line(self, text: str, **values: Any) -> None:
        """Writes named values."""
        self._write(f"{text}: " + ", ".join(f"{k} {_short(v)}" for k, v in values.items()))
        self._record({"line": text, **values})

    def training(self, measured: Measured, micro: str, planned: Memory | None = None) -> None:
        """Writes one row of the table; `micro` is the size of a micro-batch in rows or tokens."""
        m = measured
        cells = [self.name, micro, m.rows_per_second, m.tokens_per_second, m.seconds]
        cells += [f"{m.mfu:.1%}", m.tflops, m.allocated, m.reserved, m.on_device, m.host]
        if planned:
            total, held = planned.total / GIB, (planned.total - planned.reserve) / GIB
            ratios = [total / m.on_device, held / m.allocated] if m.allocated else ["", ""]
            cells += [total, *ratios]
        else:
            cells += ["", "", ""]
        cells += [m.setup, f"{m.losses[0]:.4f} {m.losses[-1]:.4f}"]
        if not self.has_header:
            self._write(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
            self.has_header = True
        self._write(f"| {' | '.join(_short(cell) for cell in cells)} |")
        parts = asdict(planned) if planned else None
        self._record({"training": self.name, "micro": micro, **asdict(m), "planned": parts})

    def _write(self, text: str) -> None:
        print(text, flush=True)
        with (self.folder / "table.md").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _record(self, entry: dict[str, Any]) -> None:
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, default=str) + "\n")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(part)}" for key, part in value.items()) + "}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
