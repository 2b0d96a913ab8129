"""Trains on preference pairs: direct preference optimization against the frozen start model, the
second half of Zephyr's recipe, and its variants."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from zephyr_ray.stage import Stage
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

    learning_rate: float = Field(5e-7, gt=0)
    schedule: Schedule = "linear"
    epochs: float = Field(3, gt=0)
    global_batch: int = Field(32, ge=1)

    @property
    def reference_flops(self) -> int:
        return 2 if self.needs_reference else 0

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        super().check(files, reads)
        self.check_loss()

    def objective(self) -> "Objective":
        from zephyr_ray.train.objectives import DpoObjective

        return DpoObjective(self)
