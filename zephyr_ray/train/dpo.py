"""Trains on preference pairs: direct preference optimization against the frozen start model, the
second half of Zephyr's recipe."""

from typing import TYPE_CHECKING

from pydantic import Field

from zephyr_ray.train.pair_stage import PairStage
from zephyr_ray.train.settings import Schedule
from zephyr_ray.train.stage import TrainingStage

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective


class Dpo(PairStage, TrainingStage):
    """Defaults are the paper's (arXiv 2310.16944): three epochs, linear, 5e-7, batch 32, β 0.1."""

    kind = "dpo"
    version = 2
    reference_flops = 2
    proven = "chosen"

    beta: float = Field(0.1, gt=0)
    """Weight of the KL penalty against the start model."""
    learning_rate: float = Field(5e-7, gt=0)
    schedule: Schedule = "linear"
    epochs: float = Field(3, gt=0)
    global_batch: int = Field(32, ge=1)
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood per token, added to the DPO loss."""

    def objective(self) -> "Objective":
        from zephyr_ray.train.objectives import DpoObjective

        return DpoObjective(beta=self.beta, nll_weight=self.nll_weight)
