"""Defines jobs: what the driver passes to every worker."""

from dataclasses import dataclass, replace
from pathlib import Path

from zephyr_ray.train.settings import TrainingSettings, WorkerSettings

VALIDATION = "validation/"
"""Prefix of counts and metrics of held-out rows."""


@dataclass(frozen=True)
class WorkerJob:
    """Everything that a worker needs. Its folders are on storage that every node mounts."""

    settings: WorkerSettings
    weights: str
    """Start weights: a folder or a name for `models.weights.resolve`."""
    folder: Path
    """Folder of the artifact, and scratch/ with data and journals."""

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def checkpoints(self) -> Path:
        return self.scratch / "checkpoints"

    @property
    def refusal(self) -> Path:
        """File with the message of a worker's permanent error."""
        return self.scratch / "refused"


@dataclass(frozen=True)
class Job(WorkerJob):
    """Everything that a training worker needs."""

    settings: TrainingSettings
    order: list[int]
    """Row numbers of scratch/data in training order: steps × global_batch of them."""
    reference: Path | None = None
    """File with reference log-probabilities by row id. Workers compute missing ones."""

    @property
    def validation(self) -> "Job":
        """The same job for the held-out rows, whose folder is scratch/validation."""
        # In another stage's rows, the same ids may belong to other pairs.
        reference = None if isinstance(self.settings.validation, str) else self.reference
        return replace(self, folder=self.scratch / "validation", reference=reference)

    @property
    def steps(self) -> int:
        return len(self.order) // self.settings.global_batch
