"""Measures the model on held-out rows during training: the objective's loss and metrics.

Imports PyTorch: import this module only in a worker.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from zephyr_ray.train.data import Data
from zephyr_ray.train.job import VALIDATION
from zephyr_ray.train.objectives import Terms
from zephyr_ray.train.trainer import Trainer


class Validation:
    """The held-out rows of one training run."""

    def __init__(self, trainer: Trainer, data: Data, batches: Sequence[Sequence[int]]):
        """`batches`: row numbers per forward pass of this worker; all workers must have the same
        number of passes."""
        self._trainer, self._data, self._batches = trainer, data, batches

    def measure(self) -> dict[str, float]:
        """Returns the mean loss over all trained tokens, or over all pairs, and the means of the
        metrics; the result does not depend on how rows are batched. All workers must take part.
        Draws no random numbers, so it does not change training.

        A mixture of experts is measured without its load balancing loss, which depends on the
        batches.
        """
        model = self._trainer.model_wrapped
        was_training = self._trainer.model.training
        model.eval()
        try:
            with torch.no_grad():
                passes = [self._pass(rows) for rows in self._batches]
        finally:
            model.train(was_training)
        names = passes[0][0]
        total = torch.stack([sums for _, sums in passes]).sum(dim=0)
        sums, counts = self._trainer.accelerator.gather(total[None]).sum(dim=0).unbind(dim=-1)
        means = (sums / counts.clamp(min=1)).tolist()
        return {f"{VALIDATION}{name}": mean for name, mean in zip(names, means, strict=True)}

    def _pass(self, rows: Sequence[int]) -> tuple[list[str], Tensor]:
        """Returns the names of loss and metrics, and the sum and count of each. An empty batch
        contributes nothing, but runs a pass, because with ZeRO-3 all workers must take part."""
        trainer, objective = self._trainer, self._trainer.objective
        batch = trainer.data_collator([self._data[row] for row in rows or [0]])
        batch = send_to_device(batch, trainer.args.device)
        model = trainer.model_wrapped
        output = model(**objective.inputs(batch), use_cache=False, fused_lm_head=True)
        losses, metrics = objective.losses(output, batch)
        per_token = losses.shape == output.label_mask.shape
        terms = {"loss": Terms(losses, output.label_mask if per_token else None), **metrics}
        sums = torch.stack([term.sum_and_count() for term in terms.values()])
        return [*terms], sums if rows else torch.zeros_like(sums)
