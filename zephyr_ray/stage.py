"""A stage: its settings, what it makes, and what it says of itself; and what a running one gets."""

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from zephyr_ray.demand import Calls, Footprint, Processors
from zephyr_ray.engines.model import Model, RecipeModel
from zephyr_ray.section import Section
from zephyr_ray.settings import Strict
from zephyr_ray.store import SCRATCH, Artifact, Journal, write_rows

log = logging.getLogger("zephyr_ray")

PROMPT_TOKENS, ANSWER_TOKENS = 256, 512
"""Tokens of a prompt and of an answer, for estimates, if nothing says how long they are."""


@dataclass
class Progress:
    """How far a stage is; the live table shows it."""

    done: int = 0
    total: int = 0
    unit: str = "rows"
    resumed: int = 0
    """How many of `done` an earlier attempt had finished; they say nothing about the rate."""
    note: str = ""
    started: float = field(default_factory=time.monotonic)


@dataclass
class Work:
    """One running stage. Everything it leaves in `folder` outside `scratch` is its artifact."""

    name: str
    folder: Path
    seed: int
    inputs: dict[str, Artifact]
    models: dict[str, Model]
    files: dict[str, Path]
    """Files by the setting that names them."""
    stages: "dict[str, Stage]" = field(default_factory=dict)
    """The stages that made `inputs`."""
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None
    progress: Progress = field(default_factory=Progress)
    counts: dict[str, float] = field(default_factory=dict)
    """Numbers for the manifest, MLflow and the report: rows made, dropped, truncated, …"""
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
    """One stage of a recipe. A kind is a subclass, one file and one entry in `pipeline.STAGES`."""

    kind: ClassVar[str]
    makes: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same settings come to mean another result."""
    view: ClassVar[tuple[str, str]] = ("data/{name}", "")
    """The link that a person opens, below the run's folder, and what of the artifact it shows."""
    reads_lineage: ClassVar[bool] = False
    """Whether it is given every artifact that leads to it, not only those it names."""

    def run(self, work: Work) -> None:
        """Makes the artifact in `work.folder`."""
        raise NotImplementedError

    def check(self, files: dict[str, Path], reads: "dict[str, Stage]") -> None:
        """Raises Permanent if a file (by setting) or a stage that it reads is of no use to it."""

    def expected(self, rows: dict[str, int]) -> int | None:
        """Returns the rows it will make (or steps it will take), from the rows of what it reads."""
        return next(iter(rows.values()), None)

    def answer_bounds(self) -> tuple[float, int]:
        """Returns answers per row of its artifact, and the most tokens of one, for estimates."""
        return 1, ANSWER_TOKENS

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        """Returns the mean tokens per row of its artifact, from those of what it reads, if that is
        known before it is made."""
        return None

    def calls(self, rows: dict[str, int], reads: "dict[str, Stage]") -> dict[str, Calls]:
        """Returns what each model will be asked at most, by rows of what the stage reads. A model
        that it cannot tell for is left out."""
        return {}

    def processors(self, models: dict[str, RecipeModel]) -> Processors:
        """Returns what it occupies at once; by default what the hungriest of its engines does."""
        return Processors(gpus=max((m.settings.gpus_per_actor for m in models.values()), default=0))

    def footprint(self, models: dict[str, RecipeModel]) -> Footprint:
        """Returns memory and disk; by default memory of all actors of its hungriest engine."""
        here = os.cpu_count() or 1
        each = (
            min(model.settings.actors, here) * model.settings.memory(model.shape())
            for model in models.values()
        )
        return Footprint(memory=max(each, default=0))

    def check_models(self, models: dict[str, RecipeModel]) -> None:
        """Raises Permanent if a model, whose weights are at hand, is of no use to it."""

    def section(self, artifact: Artifact) -> Section | None:
        """Returns what a finished artifact of this stage contributes to the report, if anything."""
        return None
