"""What a running stage is given: its folder, what it reads, and where it says how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zephyr_ray.recipe import ModelSpec
from zephyr_ray.store import SCRATCH, Artifact, Journal, write_rows

log = logging.getLogger("zephyr_ray")


@dataclass(frozen=True)
class Model:
    """A model ready to be started anywhere: its settings and where its weights lie.

    `weights` is a folder on shared storage, or a name that `models.weights.resolve` knows.
    """

    name: str
    spec: ModelSpec
    weights: str
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the demonstrations file, each with a "prompt" made of instruction and constraint."""


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
