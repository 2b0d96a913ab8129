"""Computes the pairs' log-probabilities under the frozen reference once, before training.

Every worker scores its share of the pairs with the start model, before there is an engine for
training, and writes each score to a journal; a restart scores only the missing ones. With ZeRO-3
the start model too is split over the workers, because it may not fit on one device. TRL's own
precomputation keeps its results in memory until the end and starts again after a failure.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.store import Journal
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import load_model

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective


def add_reference_log_probs(job: Job, objective: "Objective", data: Any) -> Any:
    """Returns the data set with the columns `ref_chosen_logps` and `ref_rejected_logps`: natural
    logarithms, summed over the answer's tokens."""
    import ray.train
    import torch.distributed

    folder = job.scratch / "reference"
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    missing = missing_rows(folder, data["lengths"])
    torch.distributed.barrier()  # no worker writes before all have read
    if missing:
        journal = Journal(folder, writer=f"rank{rank}")
        batches = shares(missing, job.settings.batches()[0], world)[rank]
        for row, chosen, rejected in _scores(job, objective, data, batches):
            journal.append({"row": row, "chosen": chosen, "rejected": rejected})
        torch.distributed.barrier()
    scores = {entry["row"]: entry for entry in Journal(folder).read_new()}
    for name in ("chosen", "rejected"):
        column = [scores[row][name] for row in range(len(data))]
        data = data.add_column(f"ref_{name}_logps", column)
    return data


def missing_rows(folder: Path, lengths: list[list[int]]) -> list[int]:
    """Returns the numbers of the rows without a score in the journal, longest first.

    `lengths` are the tokens of the chosen and of the rejected sequence per row.
    """
    scored = {entry["row"] for entry in Journal(folder).read_new()}
    missing = [row for row in range(len(lengths)) if row not in scored]
    return sorted(missing, key=lambda row: -sum(lengths[row]))


def shares(rows: list[int], size: int, world: int) -> list[list[list[int]]]:
    """Returns every worker's batches of at most `size` rows.

    Rows are dealt out in turn, for equal work and batches of similar lengths. All workers get the
    same number of batches, some of them empty, because they gather a split model together.
    """
    turns = math.ceil(len(rows) / (world * size))
    dealt = [rows[rank::world] for rank in range(world)]
    return [[own[at * size : (at + 1) * size] for at in range(turns)] for own in dealt]


def _scores(
    job: Job, objective: "Objective", data: Any, batches: list[list[int]]
) -> Iterator[tuple[int, float, float]]:
    """Yields row number, chosen and rejected log-probability; an empty batch computes row 0."""
    import torch

    from zephyr_ray.train.objectives import pair_log_probs

    collate = objective.collator(pad_token_id=0)
    bf16 = job.settings.precision == "bf16"
    with _start_model(job) as (model, device):
        for rows in batches:
            batch = collate([data[row] for row in rows or [0]])
            batch = {name: values.to(device) for name, values in batch.items()}
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                output = model(**objective.inputs(batch), fused_lm_head=True)
                chosen, rejected = pair_log_probs(output)
            yield from zip(rows, chosen.tolist(), rejected.tolist(), strict=False)


@contextmanager
def _start_model(job: Job) -> Iterator[tuple[Any, str]]:
    """Yields the start model, on this worker's device or split over all workers, and the device."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.settings.zero != 3:
        model = load_model(job.weights, job.settings.lora)
        model = model if getattr(model, "is_quantized", False) else model.to(device)
        add_fused_lm_head(model)
        yield model.eval(), device
        return
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    config = job.settings.deepspeed() | {"train_micro_batch_size_per_gpu": 1}
    for training in ("gradient_accumulation_steps", "train_batch_size", "gradient_clipping"):
        del config[training]
    config["zero_optimization"].pop("offload_optimizer", None)
    keep = HfDeepSpeedConfig(config)  # as long as it exists, from_pretrained splits the weights
    model = load_model(job.weights, job.settings.lora)
    add_fused_lm_head(model)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # which returns nothing
    yield engine, device
    engine.destroy()
    unset_hf_deepspeed_config()
    del keep
