"""A stage: its settings and what it makes; and what a running one is given."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from zephyr_ray.engines.base import Model
from zephyr_ray.section import Section
from zephyr_ray.settings import Strict
from zephyr_ray.store import SCRATCH, Artifact, Journal, write_rows

log = logging.getLogger("zephyr_ray")


@dataclass
class Progress:
    """How far a stage is; the live table shows it."""

    done: int = 0
    total: int = 0
    unit: str = "rows"
    resumed: int = 0
    """Of `done`, how many an earlier attempt had finished (they say nothing about the rate)."""
    note: str = ""
    started: float = field(default_factory=time.monotonic)


@dataclass
class Work:
    """One stage at work. Everything it leaves in `folder` outside `scratch` is its artifact."""

    name: str
    folder: Path
    seed: int
    inputs: dict[str, Artifact]
    models: dict[str, Model]
    files: dict[str, Path]
    """FILE settings by field name, resolved."""
    stages: "dict[str, Stage]" = field(default_factory=dict)
    """The stages that made `inputs`."""
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None
    progress: Progress = field(default_factory=Progress)
    counts: dict[str, float] = field(default_factory=dict)
    """Numbers for the manifest, MLflow and the report: what was made, dropped, truncated, …"""
    examples: dict[str, list[Any]] = field(default_factory=dict)
    """A few examples behind a count (dropped rows, failed rows)."""

    @property
    def scratch(self) -> Path:
        """Durable while the stage runs (journals, checkpoints), removed after the manifest."""
        return self.folder / SCRATCH

    def journal(self, name: str, writer: str | None = None) -> Journal:
        return Journal(self.scratch / name, writer)

    def write_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        self.counts["rows"] = write_rows(self.folder, rows)

    def drop(self, rule: str, example: Any) -> None:
        """Counts one dropped thing under its rule and keeps the first three as examples."""
        self.counts[f"dropped/{rule}"] = self.counts.get(f"dropped/{rule}", 0) + 1
        kept = self.examples.setdefault(f"dropped/{rule}", [])
        if len(kept) < 3:
            kept.append(example)


class Stage(Strict):
    """One stage: its settings, and `run`, which makes its artifact."""

    kind: ClassVar[str]
    makes: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same settings come to mean another result."""

    def run(self, work: Work) -> None:
        raise NotImplementedError

    def check(self, files: dict[str, Path], reads: "dict[str, Stage]") -> None:
        """Raises Permanent when a FILE setting (by field name), or a stage that is read, holds what
        `run` cannot use."""

    def expected(self, rows: dict[str, int]) -> int | None:
        """Rows this stage will make (or steps it will take), from the rows of what it reads."""
        return next(iter(rows.values()), None)

    def section(self, artifact: Artifact) -> Section | None:
        """Returns what a finished artifact of this stage contributes to the report, if anything."""
        return None
