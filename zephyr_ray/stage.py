"""Defines stages: their settings, what they declare, and the work of a running one."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from zephyr_ray.demand import Calls, Footprint, Processors
from zephyr_ray.engines.model import Model, RecipeModel
from zephyr_ray.engines.pool import EnginePool
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import list_counts, percent
from zephyr_ray.section import Section
from zephyr_ray.settings import OPERATIONAL, Strict, not_in_key
from zephyr_ray.store import SCRATCH, Artifact, Journal, write_rows

log = logging.getLogger("zephyr_ray")

PROMPT_TOKENS, ANSWER_TOKENS = 256, 512
"""Tokens of a prompt and of an answer in estimates, if their lengths are unknown."""
MAX_FAILED = 0.05
"""Default of `BoundedStage.max_failed`."""


@dataclass
class Progress:
    """The progress of a stage, for the live table."""

    done: int = 0
    total: int = 0
    unit: str = "rows"
    resumed: int = 0
    """Part of `done` that earlier attempts finished; excluded from the rate."""
    note: str = ""
    started: float = field(default_factory=time.monotonic)

    def restart(self, unit: str, total: int = 0) -> None:
        """Starts again from 0, for the next part of the stage."""
        self.unit, self.total = unit, total
        self.done = self.resumed = 0
        self.started = time.monotonic()


@dataclass(frozen=True)
class Variant:
    """A copy of a stage or model that a recipe's sweep made."""

    of: str
    """Name of the stage or model in the recipe."""
    settings: dict[str, Any]
    """Values of the swept settings that it depends on, by names such as dpo.beta."""


def original_name(name: str, variants: Mapping[str, Variant]) -> str:
    """Returns the name that a stage or model has in the recipe, before its sweep."""
    return variants[name].of if name in variants else name


@dataclass
class Work:
    """One running stage. Its artifact is everything in `folder` except `scratch`."""

    name: str
    folder: Path
    seed: int
    inputs: dict[str, Artifact]
    models: dict[str, Model]
    files: dict[str, Path]
    """Files by the setting that names them."""
    stages: "dict[str, Stage]" = field(default_factory=dict)
    """The stages that made `inputs`."""
    variants: dict[str, Variant] = field(default_factory=dict)
    """The recipe's stages and models that its sweep copied, by the name of the copy."""
    recipe: str = ""
    """Name of the recipe."""
    log_metrics: Callable[[dict[str, float], int], None] = lambda metrics, step: None
    """Logs metrics of a step to MLflow."""
    max_failed: float = MAX_FAILED
    """The `BoundedStage.max_failed` of the stage."""
    give_up: Collection[str] = ()
    """The `RowStage.give_up` of the stage."""
    engines: EnginePool = field(default_factory=EnginePool)
    """The engine processes of the run."""
    progress: Progress = field(default_factory=Progress)
    counts: dict[str, float] = field(default_factory=dict)
    """Numbers for the manifest, MLflow and the report: rows made, dropped, truncated, …"""
    examples: dict[str, list[Any]] = field(default_factory=dict)
    """Up to three examples per count (dropped rows, failed rows, …)."""

    @property
    def scratch(self) -> Path:
        """Folder for journals and checkpoints; kept between attempts, removed once the manifest is
        written."""
        return self.folder / SCRATCH

    @property
    def storage(self) -> Path:
        """The folder of the store that `folder` is in, of answers and of ledgers."""
        return self.folder.parents[1]

    def journal(self, name: str, writer: str | None = None) -> Journal:
        return Journal(self.scratch / name, writer)

    def write_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        self.counts["rows"] = write_rows(self.folder, rows)

    def drop(self, rule: str, example: Any) -> None:
        """Counts one dropped item under its rule and keeps the first three as examples."""
        self.count(f"dropped/{rule}", example)

    def count(self, name: str, example: Any) -> None:
        """Counts one item under a name and keeps the first three as examples."""
        self.counts[name] = self.counts.get(name, 0) + 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < 3:
            examples.append(example)

    def allowed(self, rows: int) -> int:
        """Returns how many of the rows may fail."""
        # Rounded first, because 0.29 * 100 is a little less than 29.
        return max(1, int(round(self.max_failed * rows, 6))) if self.max_failed else 0

    def check_dropped(self, rows: int, sound: Collection[str] = ()) -> None:
        """Raises Permanent if more of the rows were dropped than `max_failed` allows; `sound`
        names rules that drop sound rows, which do not count."""
        rules = {
            name.removeprefix("dropped/"): count
            for name, count in self.counts.items()
            if name.startswith("dropped/") and name.removeprefix("dropped/") not in sound
        }
        dropped, allowed = int(sum(rules.values())), self.allowed(rows)
        if dropped > allowed:
            most = max(rules, key=rules.__getitem__)
            example = self.examples[f"dropped/{most}"][0]
            raise Permanent(
                f"stage '{self.name}': {dropped} of {rows} rows were dropped "
                f"({percent(dropped / rows)}: {list_counts(rules)}), max_failed allows {allowed}; "
                f"the first row dropped as '{most}': {example}; correct the rows, or raise "
                f"{self.name}.max_failed to go on without them"
            )


class Stage(Strict):
    """One stage of a recipe. A kind is a subclass: one file and one entry in `pipeline.STAGES`."""

    kind: ClassVar[str]
    makes: ClassVar[str]
    """Type of its artifact, as `Reads` names it."""
    trains_model: ClassVar[bool] = False
    """Whether the artifact is a model, which other stages may name like a model of the recipe."""
    by_people: ClassVar[bool] = False
    """Whether people, not a judge, scored the answers in the artifact."""
    version: ClassVar[int] = 1
    """Part of the content key; raise it if the same settings give another result."""
    unit: ClassVar[str] = "rows"
    """Plural noun for what its throughput counts."""
    view: ClassVar[tuple[str, str]] = ("data/{name}", "")
    """Path of the link in the run's folder, and its target in the artifact's folder."""
    limits: ClassVar[str] = ""
    """A known limit of what it makes, as a sentence for cards."""
    reads_lineage: ClassVar[bool] = False
    """Whether `Work.inputs` holds all artifacts that lead to the stage, not only those it reads."""

    def identity(self) -> dict[str, Any]:
        """Returns the settings that the content key hashes, before names and files are resolved. A
        kind overrides it if a setting selects texts of this package; their hash replaces it."""
        return self.model_dump(mode="json", exclude=not_in_key(self))

    def run(self, work: Work) -> None:
        """Makes the artifact in `work.folder`."""
        raise NotImplementedError

    def check(self, files: dict[str, Path], reads: "dict[str, Stage]") -> None:
        """Raises Permanent if the stage cannot use a file (by setting) or a stage that it reads."""

    def expected(self, rows: dict[str, int]) -> int | None:
        """Returns the expected number of rows of the artifact, from those of the stages it reads;
        None if unknown."""
        return next(iter(rows.values()), None)

    def rows_of_files(self, files: dict[str, Path]) -> int | None:
        """Returns the number of rows that the stage makes from its files (by setting) alone; None
        if unknown."""
        return None

    def answer_bounds(self) -> tuple[float, int]:
        """Returns answers per row of the artifact and maximum tokens per answer, for estimates."""
        return 1, ANSWER_TOKENS

    def answer_tokens(self) -> int:
        """Returns the maximum tokens of any answer that the stage requests; 0 if none."""
        return 0

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        """Returns the expected mean tokens per row of the artifact, from those of the stages it
        reads; None if unknown."""
        return None

    def calls(self, rows: dict[str, int], reads: "dict[str, Stage]") -> dict[str, Calls]:
        """Returns upper bounds of the calls to each model, from the rows of the stages it reads.
        Models with unknown bounds are omitted."""
        return {}

    def processors(self, models: dict[str, RecipeModel]) -> Processors:
        """Returns the peak CPUs and GPUs; by default the GPUs per actor of its largest
        engine."""
        return Processors(gpus=max((m.settings.gpus_per_actor for m in models.values()), default=0))

    def footprint(self, models: dict[str, RecipeModel]) -> Footprint:
        """Returns peak memory and disk; by default the memory of all actors of its largest
        model."""
        cpus = os.cpu_count() or 1
        memory_by_model = (
            min(model.settings.actors, cpus) * model.settings.memory(model.shape())
            for model in models.values()
        )
        return Footprint(memory=max(memory_by_model, default=0))

    def preflight(self) -> None:
        """Fetches what the stage reads besides its files, models and other stages. Raises Permanent
        if that fails."""

    def check_models(self, models: dict[str, RecipeModel]) -> None:
        """Raises Permanent if the stage cannot use a model; called after the models' own checks."""

    def section(self, artifact: Artifact) -> Section | None:
        """Returns what an artifact of this stage contributes to the report; None for nothing."""
        return None


class BoundedStage(Stage):
    """Stops if too many of its rows are missing or unusable because of faults of their own."""

    max_failed: Annotated[float, OPERATIONAL] = Field(MAX_FAILED, ge=0, le=1)
    """Maximum share of the rows that may fail, but at least one row unless it is 0; above it, the
    stage stops."""


class RowStage(BoundedStage):
    """Runs a row program."""

    give_up: Annotated[list[str], OPERATIONAL] = []
    """Ids of rows to drop without further requests; they count as failed. For rows to which an
    endpoint always gives the same unusable reply."""
