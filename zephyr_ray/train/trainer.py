"""Minimizes an objective with TRL's trainer.

Imports TRL, which takes seconds: import this module only in a worker.
"""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from zephyr_ray.train.objectives import Batch, Metrics, Objective, Terms


class Trainer(SFTTrainer):
    """TRL's trainer with an objective's batches, losses and metrics in place of its own. TRL adds
    adapters and the fused output layer, and averages and logs the metrics."""

    def __init__(self, objective: Objective, tags: list[str], tokenizer: Any, **others: Any):
        self._tag_names = tags
        collator = objective.collator(tokenizer.pad_token_id, others["model"])
        super().__init__(processing_class=tokenizer, data_collator=collator, **others)
        self.objective = objective
        self._recorded: list[tuple[list[str], Tensor]] = []
        # Makes transformers count a step's trained tokens, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        if not objective.dropout:
            disable_dropout_in_model(self.model)
        # Replaces TRL's own output layer, which computes the fields of its SFT metrics only.
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_fused_lm_head(model, outputs=("log_probs", *objective.fields))

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Returns this worker's part of the step's mean loss.

        transformers averages over forward passes unless it has counted the step's trained tokens
        over all workers (`num_items_in_batch`), and DeepSpeed averages gradients over workers.
        """
        output = model(**self.objective.inputs(inputs), use_cache=False, fused_lm_head=True)
        losses, metrics = self.objective.losses(output, inputs)
        passes = 1
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
            passes = self.current_gradient_accumulation_steps
        if output.aux_loss is not None:  # load balancing in a mixture of experts
            loss = loss + self.router_aux_loss_coef * output.aux_loss / passes
            metrics["aux_loss"] = Terms(output.aux_loss)
        self._record(metrics, self.objective.tokens(inputs))
        return loss

    def _record(self, metrics: Metrics, tokens: Tensor) -> None:
        """Keeps the metrics of one forward pass on the device until the step is logged."""
        terms = [*metrics.values(), Terms(tokens)]
        sums = torch.stack([term.sum_and_count() for term in terms])
        self._recorded.append(([*metrics], sums))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the metrics of the forward passes since the last time, over all workers, and the
        tokens seen since the start."""
        if self._recorded:
            names = self._recorded[0][0]
            sums = torch.stack([passed for _, passed in self._recorded])
            self._recorded.clear()
            sums, counts = self.accelerator.gather(sums[None]).sum(dim=0).unbind(dim=-1)
            for means in (sums / counts.clamp(min=1)).tolist():
                for name, mean in zip(names, means, strict=False):
                    self._metrics["train"][name].append(mean)
            self._total_train_tokens += sums[:, -1].sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Counts nothing: transformers would count the model's parameters at every forward pass."""
        return 0

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        """Writes nothing: a checkpoint is the engine's state alone, without a copy of the model."""
        if not _internal_call:
            raise AssertionError("the model is saved by train.model.save")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass
