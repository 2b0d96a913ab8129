"""Trains on preference pairs: direct preference optimization against the frozen start model, the
second half of Zephyr's recipe, and its variants."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import ROWS
from zephyr_ray.train.loss_settings import LossSettings
from zephyr_ray.train.pair_stage import PairStage
from zephyr_ray.train.settings import Schedule
from zephyr_ray.train.stage import TrainingStage

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective


class Dpo(PairStage, TrainingStage, LossSettings):
    """Defaults are the paper's (arXiv 2310.16944): three epochs, linear, 5e-7, batch 32, β 0.1."""

    kind = "dpo"
    version = 2
    proven = "chosen"

    validation: Annotated[str | float | None, ADDED, Reads("pairs")] = None
    learning_rate: float = Field(5e-7, gt=0)
    schedule: Schedule = "linear"
    epochs: float = Field(3, gt=0)
    global_batch: int = Field(32, ge=1)
    reference: Annotated[str | None, ADDED, Reads("log_probs")] = None
    """Stage that computes the reference log-probabilities, so that several dpo stages can share
    them; by default this stage computes its own before training."""

    @property
    def reference_flops(self) -> int:
        return 2 if self.needs_reference and not self.reference else 0

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        super().check(files, reads)
        self.check_loss()
        if self.reference:
            self._check_reference(reads[self.reference])

    def _check_reference(self, reference: Stage) -> None:
        """Raises Permanent if this stage would compute other reference log-probabilities."""
        assert isinstance(reference, PairStage)
        for name in ("model", "data", "max_length", "precision"):
            theirs, ours = getattr(reference, name), getattr(self, name)
            if theirs != ours:
                raise Permanent(
                    f"reference '{self.reference}' has {name} {theirs}, this stage has {ours}; "
                    f"give both the same {name}"
                )
        if reference.is_quantized() != self.is_quantized():
            quantized = str(self.is_quantized()).lower()
            raise Permanent(
                f"this stage's lora.quantized is {quantized}, reference '{self.reference}' differs;"
                f" set {self.reference}.quantized: {quantized}"
            )

    def reference_file(self, work: Work) -> Path | None:
        return work.inputs[self.reference].file(ROWS) if self.reference else None

    def objective(self) -> "Objective":
        from zephyr_ray.train.objectives import DpoObjective

        return DpoObjective(self)
