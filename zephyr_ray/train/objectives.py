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

from zephyr_ray.train import losses as loss_functions
from zephyr_ray.train.batches import Dealer
from zephyr_ray.train.data import Data
from zephyr_ray.train.loss_settings import LossSettings
from zephyr_ray.train.losses import Answers, answer_nll, token_nll
from zephyr_ray.train.model import FAMILIES
from zephyr_ray.train.pairs import (
    model_inputs,
    pair_collator,
    pair_lengths,
    pair_log_probs,
    per_answer,
    why_not_shared,
)

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
    dropout: ClassVar[bool] = True
    """Whether the model's dropout layers stay active."""

    @property
    def needs_reference(self) -> bool:
        """Whether rows need reference log-probabilities (`reference.add_reference_log_probs`)."""
        return False

    @abstractmethod
    def pads(self, config: Any) -> bool:
        """Returns whether batches are padded for a model with this configuration; else a batch is
        one row, in which each sequence attends only to itself."""

    def lengths(self, data: Data, padded: bool) -> list[int]:
        """Returns the tokens of each row of the data in a batch."""
        lengths: list[int] = data.lengths.tolist()
        return lengths

    def dealer(self, config: Any, data: Data, capacity: int, workers: int) -> Dealer:
        """Returns the dealer of the data's rows to micro-batches of at most `capacity` tokens."""
        padded = self.pads(config)
        return Dealer(self.lengths(data, padded), capacity, workers, padded)

    @abstractmethod
    def collator(self, pad_token_id: int, model: Any) -> Any:
        """Returns the function that makes the model's batch from rows."""

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
        step's trained tokens; else they are per row.
        """


@dataclass(frozen=True)
class SftObjective(Objective):
    """Negative log-likelihood per trained token. A row has `input_ids`, `labels` and, if dialogues
    are packed, `seq_lengths`. A batch is one row, with positions that restart at each dialogue; or
    padded, if dialogues are not packed and the model does not attend per segment: attention over
    the concatenated batch would cost more than padding."""

    packing: bool
    """Whether a row holds several dialogues."""

    fields = ("entropy", "is_top1")

    def pads(self, config: Any) -> bool:
        return not self.packing and config.model_type not in FAMILIES

    def collator(self, pad_token_id: int, model: Any) -> Any:
        joined = not self.pads(model.config)
        return DataCollatorForLanguageModeling(pad_token_id, padding_free=joined)

    def losses(self, output: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        trained = output.label_mask
        return token_nll(output.log_probs, trained), {
            "entropy": Terms(output.entropy, trained),
            "mean_token_accuracy": Terms(output.is_top1, trained),
        }


@dataclass(frozen=True)
class DpoObjective(Objective):
    """Weighted sum of losses of pairs (`losses`) and of the chosen answers' negative
    log-likelihood. A row has `prompt_ids`, `chosen_ids` and `rejected_ids`; a batch holds each
    prompt once (`pairs.shared_prompts`), or, if the model cannot share them, all chosen sequences,
    then all rejected ones."""

    settings: LossSettings

    fields = ("entropy", "is_top1", "mean_logits")
    dropout = False

    @property
    def needs_reference(self) -> bool:
        return self.settings.needs_reference

    def pads(self, config: Any) -> bool:
        return bool(why_not_shared(config))

    def lengths(self, data: Data, padded: bool) -> list[int]:
        return pair_lengths(data, padded)

    def collator(self, pad_token_id: int, model: Any) -> Any:
        return pair_collator(pad_token_id, model.config)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return model_inputs(batch)

    def tokens(self, batch: Batch) -> Tensor:
        if "answers" not in batch:
            return super().tokens(batch)
        # The last token of a sequence is not an input.
        tokens: Tensor = batch["cu_seq_lens_k"][-1] + 2 * len(batch["answers"])
        return tokens

    def losses(self, output: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        output = per_answer(output, batch)
        chosen, rejected = self._answers(output, batch)
        settings = self.settings
        parts = {
            name: getattr(loss_functions, name)(chosen, rejected, settings)
            for name in settings.loss
        }
        losses: Tensor = sum(weight * parts[name] for name, weight in settings.loss.items())

        chosen_reward, rejected_reward = self._rewards(chosen), self._rewards(rejected)
        answers = output.label_mask
        chosen_mask, rejected_mask = answers.chunk(2)
        chosen_logits, rejected_logits = output.mean_logits.chunk(2)
        metrics = {
            "entropy": Terms(output.entropy, answers),
            "logits/chosen": Terms(chosen_logits, chosen_mask),
            "logits/rejected": Terms(rejected_logits, rejected_mask),
            "mean_token_accuracy": Terms(output.is_top1.chunk(2)[0], chosen_mask),
            "rewards/chosen": Terms(chosen_reward),
            "rewards/rejected": Terms(rejected_reward),
            "rewards/accuracies": Terms(chosen_reward > rejected_reward),
            "rewards/margins": Terms(chosen_reward - rejected_reward),
            "logps/chosen": Terms(chosen.log_probs),
            "logps/rejected": Terms(rejected.log_probs),
        }
        if len(parts) > 1 or settings.nll_weight:
            metrics |= {f"loss/{name}": Terms(part) for name, part in parts.items()}
        if settings.nll_weight:
            nll = answer_nll(chosen)
            metrics["nll"] = Terms(nll)
            losses = losses + settings.nll_weight * nll
        return losses, metrics

    def _answers(self, output: Any, batch: Batch) -> tuple[Answers, Answers]:
        tokens = output.label_mask.sum(dim=1).chunk(2)
        log_probs = pair_log_probs(output)
        names = ("ref_chosen_logps", "ref_rejected_logps")
        references = [batch[name] if self.needs_reference else None for name in names]
        chosen, rejected = map(Answers, log_probs, references, tokens)
        return chosen, rejected

    def _rewards(self, answers: Answers) -> Tensor:
        """Returns the rewards that the losses compare: DPO's, or SimPO's if none uses a
        reference."""
        if self.needs_reference:
            return self.settings.beta * answers.log_ratios.detach()
        return self.settings.beta * answers.log_probs.detach() / answers.tokens
