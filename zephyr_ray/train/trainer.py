"""Minimizes an objective with TRL's trainer.

Imports TRL, which takes seconds: import this module only in a worker.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from zephyr_ray.train.batches import MicroBatch
from zephyr_ray.train.objectives import Batch, Metrics, Objective, Terms


class Batches:
    """The batches of one worker, made from rows on access. Each has the item `weight`."""

    def __init__(
        self,
        data: Any,
        micro_batches: Sequence[MicroBatch],
        collate: Callable[[list[dict[str, Any]]], Batch],
    ):
        self.data, self.micro_batches, self.collate = data, micro_batches, collate

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, at: int) -> Batch:
        """Returns a batch; for an empty micro-batch, that of the first row, without labels."""
        micro_batch = self.micro_batches[at]
        batch = self.collate([self.data[row] for row in micro_batch.rows or [0]])
        if not micro_batch.rows and "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch | {"weight": micro_batch.weight}


class Trainer(SFTTrainer):
    """TRL's trainer with an objective's batches, losses and metrics in place of its own. TRL adds
    adapters and the fused output layer, and logs the metrics."""

    def __init__(
        self,
        objective: Objective,
        tags: list[str],
        tokenizer: Any,
        data: Any,
        steps: Sequence[Sequence[MicroBatch]],
        global_batch: int,
        **others: Any,
    ):
        """`steps` are this worker's micro-batches, of rows of `data`; `global_batch` counts the
        rows of a step over all workers."""
        self._tag_names = tags
        collator = objective.collator(tokenizer.pad_token_id, others["model"])
        super().__init__(
            processing_class=tokenizer,
            data_collator=collator,
            train_dataset=Dataset.from_list([data[0]]),  # TRL looks at the columns
            **others,
        )
        self.objective, self.global_batch = objective, global_batch
        micro_batches = [micro_batch for step in steps for micro_batch in step]
        self.batches = Batches(data, micro_batches, collator)
        self._recorded: list[tuple[list[str], Tensor]] = []
        # Makes transformers count a step's trained tokens, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        if not objective.dropout:
            disable_dropout_in_model(self.model)
        # Replaces TRL's own output layer, which computes the fields of its SFT metrics only.
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_fused_lm_head(model, outputs=("log_probs", *objective.fields))

    def get_train_dataloader(self) -> DataLoader:
        """Returns the batches of this worker; accelerate would deal them to the workers again."""
        loader = DataLoader(
            self.batches,
            batch_size=1,
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader,
            device=self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=self.args.accelerator_config.non_blocking,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: Any) -> Tensor | int:
        """Counts the terms of a step's mean loss over all workers: trained tokens, or rows."""
        tokens = super()._get_num_items_in_batch(batch_samples, device)
        return self.global_batch if tokens is None else tokens

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Returns this forward pass's part of the step's mean loss over `num_items_in_batch` terms,
        times the number of workers, because DeepSpeed averages gradients over them."""
        weight, workers = inputs.pop("weight"), self.accelerator.num_processes
        output = model(**self.objective.inputs(inputs), use_cache=False, fused_lm_head=True)
        losses, metrics = self.objective.losses(output, inputs)
        loss = losses.sum() * ((weight > 0) * workers) / num_items_in_batch
        if output.aux_loss is not None:  # load balancing in a mixture of experts
            loss = loss + self.router_aux_loss_coef * output.aux_loss * (weight * workers)
            metrics["aux_loss"] = Terms(output.aux_loss)
        if "attention_mask" in inputs:
            metrics["real_token_share"] = Terms(inputs["attention_mask"])
        if weight:
            self._record(metrics, self.objective.tokens(inputs))
        return loss

    def _record(self, metrics: Metrics, tokens: Tensor) -> None:
        """Keeps the metrics of one forward pass on the device until the step is logged."""
        terms = [*metrics.values(), Terms(tokens)]
        sums = torch.stack([term.sum_and_count() for term in terms])
        self._recorded.append(([*metrics], sums))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the metrics of the forward passes since the last call, over all workers, and the
        tokens seen since the start."""
        if self._recorded:
            names = self._recorded[0][0]
            total = torch.stack([sums for _, sums in self._recorded]).sum(dim=0)
            self._recorded.clear()
            sums, counts = self.accelerator.gather(total[None]).sum(dim=0).unbind(dim=-1)
            for name, mean in zip(names, (sums / counts.clamp(min=1)).tolist(), strict=False):
                self._metrics["train"][name].append(mean)
            # The history is part of a checkpoint, so a resumed run continues the count.
            before = self.state.log_history[-1]["num_tokens"] if self.state.log_history else 0
            self._metrics["train"]["num_tokens"] = [before + sums[-1].item()]
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
