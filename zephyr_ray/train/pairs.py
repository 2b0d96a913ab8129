"""Writes the pairs of a micro-batch into one row, each prompt once.

Both answers share the prompt, so a pair is written as prompt, chosen branch, rejected branch: the
positions of both branches continue the prompt's, and no branch attends to the other. Imports
PyTorch: import this module only in a worker.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from zephyr_ray.stage import log
from zephyr_ray.train.data import Data
from zephyr_ray.train.model import FAMILIES

MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "shift_labels",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "key_rows",
)
"""Items of a batch that the model takes."""


def pair_collator(pad_token_id: int, config: Any) -> Any:
    """Returns the function that makes a batch of rows with `prompt_ids`, `chosen_ids` and
    `rejected_ids`: each prompt once, or, if the model with this configuration cannot share them,
    all chosen sequences, then all rejected ones."""
    why = why_not_shared(config)
    if not why:
        return shared_prompts
    log.info("prompts are computed twice per pair: %s %s", config.model_type, why)
    return DataCollatorForPreference(pad_token_id)


def pair_lengths(data: Data, padded: bool) -> list[int]:
    """Returns the tokens of each row of the data in a batch."""
    lengths: list[int] = data.lengths.tolist()
    if not padded:
        return lengths
    rows = map(data.__getitem__, range(len(data)))
    answers = ((row["chosen_ids"], row["rejected_ids"]) for row in rows)
    # Padding makes both sequences of a pair as long as the longer one.
    return [
        2 * (length - min(map(len, both))) for length, both in zip(lengths, answers, strict=True)
    ]


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the model; `labels` are -100 outside the answers."""
    if "answers" in batch:
        return {name: batch[name] for name in MODEL_INPUTS}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def why_not_shared(config: Any) -> str:
    """Returns why a pair in one row would give other results than two sequences; "" if it does not.

    A mixture of experts balances its load over all tokens, in which a prompt must count twice.
    """
    if config.model_type not in FAMILIES:
        return "does not attend per segment"
    if hasattr(config, "output_router_logits") and config.router_aux_loss_coef:
        return "balances its experts over all tokens"
    return ""


def shared_prompts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the batch of rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Each branch begins with the prompt's last token, because that predicts the answer's first
    token. `answers` and `answer_at` have shape (pairs, 2, longest answer): which tokens exist, and
    their positions in the row.
    """
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    key_rows: list[int] = []
    queries: list[int] = []
    keys: list[int] = []
    starts: list[int] = []
    for row in rows:
        *shared, last = row["prompt_ids"]
        prompt = range(len(ids), len(ids) + len(shared))
        ids += shared
        positions += range(len(shared))
        targets += [-100] * len(shared)
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            branch = range(len(ids), len(ids) + len(answer))
            starts.append(branch.start)
            ids += [last, *answer[:-1]]
            positions += range(len(shared), len(shared) + len(answer))
            targets += answer
            key_rows += [*prompt, *branch]
            keys.append(len(prompt) + len(branch))
        # The prompt's queries belong to the chosen branch.
        queries += [keys[-2], len(branch)]
    lengths = torch.tensor([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows])
    token = torch.arange(int(lengths.max()))
    answers = token < lengths[:, :, None]
    batch = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "shift_labels": torch.tensor([targets]),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
        "max_length_q": max(queries),
        "max_length_k": max(keys),
        "key_rows": torch.tensor(key_rows),
        "answers": answers,
        "answer_at": (torch.tensor(starts).view(-1, 2, 1) + token) * answers,
    }
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        if name in rows[0]:
            batch[name] = torch.tensor([row[name] for row in rows])
    return batch


def per_answer(output: Any, batch: dict[str, Any]) -> Any:
    """Returns the output with one row per answer: all chosen ones, then all rejected ones. The
    output of a padded batch has these rows already."""
    answers = batch.get("answers")
    if answers is None:
        return output
    mask, at = output.label_mask, batch["answer_at"]

    def rows(values: Tensor) -> Tensor:
        spread = values[0].gather(0, at.flatten()).view(at.shape)
        return spread.masked_fill(~answers, 0).transpose(0, 1).flatten(0, 1)

    fields = {name: rows(field) for name, field in output.items() if field.shape == mask.shape}
    return FusedCausalLMOutput(**fields)


def pair_log_probs(output: Any) -> tuple[Tensor, Tensor]:
    """Returns log π(y|x) of the chosen and of the rejected answers, each of shape (pairs,).

    `output` has one row per answer (`per_answer`).
    """
    chosen, rejected = output.log_probs.sum(dim=1).chunk(2)
    return chosen, rejected
