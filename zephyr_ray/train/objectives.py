"""Defines the objectives of training stages: batches of rows, and their losses and metrics.

`TrainingSettings.objective` creates one, `trainer.Trainer` minimizes it. Imports PyTorch and TRL:
import this module only in a worker.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from zephyr_ray.train.attention import uses_segments
from zephyr_ray.train.losses import answer_nll, dpo_loss, token_nll
from zephyr_ray.train.pairs import model_inputs, pair_collator, pair_log_probs, per_answer

Batch = dict[str, Any]


class Terms(NamedTuple):
    """The terms of a metric's mean. A mask selects them, because indexing with it would wait for
    the GPU to count them."""

    values: Tensor
    mask: Tensor | None = None
    """Which values count, or None for all."""

    def sum_and_count(self) -> Tensor:
        """Returns both in fp64, on the device."""
        if self.mask is None:
            total = self.values.detach().sum(dtype=torch.float64)
            return torch.stack([total, torch.full_like(total, self.values.numel())])
        selected = torch.where(self.mask, self.values.detach(), 0)
        return torch.stack([part.sum(dtype=torch.float64) for part in (selected, self.mask)])


Metrics = dict[str, Terms]
"""Terms by metric; the trainer logs the mean over the terms of all workers."""


class Objective(ABC):
    """Batches, losses and metrics of one training stage."""

    fields: ClassVar[tuple[str, ...]]
    """Fields of TRL's FusedCausalLMOutput that the metrics need besides `log_probs`."""
    needs_reference: ClassVar[bool] = False
    """Whether rows need reference log-probabilities (`reference.add_reference_log_probs`)."""
    dropout: ClassVar[bool] = True
    """Whether the model's dropout layers stay active."""

    @abstractmethod
    def collator(self, pad_token_id: int, model: Any) -> Any:
        """Returns the function that makes a batch of rows for the model."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the arguments of the model; `labels` are -100 at untrained positions."""
        return dict(batch)

    def tokens(self, batch: Batch) -> Tensor:
        """Returns the number of tokens of the batch's sequences, without padding."""
        mask: Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        return mask.sum()

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the loss of every token (0 if it is not trained) or of every pair, and the
        metrics.

        `output` is TRL's FusedCausalLMOutput. The trainer minimizes the mean over the global batch.
        If losses are per token, the batch must have `labels`, from which the trainer counts a
        step's trained tokens.
        """


@dataclass(frozen=True)
class SftObjective(Objective):
    """Negative log-likelihood per trained token. A row has `input_ids`, `labels` and, if dialogues
    are packed, `seq_lengths`. A batch is one row, with positions that restart at each dialogue; or
    padded, if dialogues are not packed and the model does not attend per segment: a step's rows
    have similar lengths, so padding costs less than attention over the concatenated batch."""

    packing: bool
    """Whether a row holds several dialogues."""

    fields = ("entropy", "is_top1")

    def collator(self, pad_token_id: int, model: Any) -> Any:
        joined = self.packing or uses_segments(model)
        return DataCollatorForLanguageModeling(pad_token_id, padding_free=joined)

    def losses(self, output: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        trained = output.label_mask
        return token_nll(output.log_probs, trained), {
            "entropy": Terms(output.entropy, trained),
            "mean_token_accuracy": Terms(output.is_top1, trained),
        }


@dataclass(frozen=True)
class DpoObjective(Objective):
    """DPO, plus the weighted negative log-likelihood of the chosen answers. A row has `prompt_ids`,
    `chosen_ids` and `rejected_ids`; a batch holds each prompt once (`pairs.shared_prompts`), or, if
    the model cannot share them, all chosen sequences, then all rejected ones."""

    beta: float
    nll_weight: float

    fields = ("entropy", "is_top1", "mean_logits")
    needs_reference = True
    dropout = False

    def collator(self, pad_token_id: int, model: Any) -> Any:
        return pair_collator(pad_token_id, model)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return model_inputs(batch)

    def tokens(self, batch: Batch) -> Tensor:
        if "answers" not in batch:
            return super().tokens(batch)
        # A sequence's last token is no input.
        tokens: Tensor = batch["cu_seq_lens_k"][-1] + 2 * len(batch["answers"])
        return tokens

    def losses(self, output: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        output = per_answer(output, batch)
        chosen, rejected = pair_log_probs(output)
        chosen_ratio = chosen - batch["ref_chosen_logps"]
        rejected_ratio = rejected - batch["ref_rejected_logps"]
        losses = dpo_loss(chosen_ratio, rejected_ratio, self.beta)

        chosen_reward = self.beta * chosen_ratio.detach()
        rejected_reward = self.beta * rejected_ratio.detach()
        answers = output.label_mask
        chosen_tokens, rejected_tokens = answers.chunk(2)
        chosen_logits, rejected_logits = output.mean_logits.chunk(2)
        metrics = {
            "entropy": Terms(output.entropy, answers),
            "logits/chosen": Terms(chosen_logits, chosen_tokens),
            "logits/rejected": Terms(rejected_logits, rejected_tokens),
            "mean_token_accuracy": Terms(output.is_top1.chunk(2)[0], chosen_tokens),
            "rewards/chosen": Terms(chosen_reward),
            "rewards/rejected": Terms(rejected_reward),
            "rewards/accuracies": Terms(chosen_reward > rejected_reward),
            "rewards/margins": Terms(chosen_reward - rejected_reward),
            "logps/chosen": Terms(chosen),
            "logps/rejected": Terms(rejected),
        }
        if self.nll_weight:
            nll = answer_nll(chosen, chosen_tokens.sum(dim=1))
            metrics["nll"] = Terms(nll)
            losses = losses + self.nll_weight * nll
        return losses, metrics
