"""Computes reference log-probabilities of all pairs once, before training.

Every worker runs the reference model (the model that training starts from) on its part of the
pairs, before the training engine exists, and writes each result to a journal; a restart computes
only the missing ones. With ZeRO-3 the reference model too is split over the workers, because it may
not fit on one device. TRL's own precomputation keeps its results in memory until the end and starts
again after a failure.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.store import Journal
from zephyr_ray.train.batches import Dealer
from zephyr_ray.train.job import WorkerJob
from zephyr_ray.train.model import load_model

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective


def add_reference_log_probs(
    job: WorkerJob, objective: "Objective", data: Any, dealer: Dealer
) -> Any:
    """Returns the data set with the columns `ref_chosen_logps` and `ref_rejected_logps`: natural
    logarithms, summed over the answer's tokens."""
    import torch.distributed

    folder = job.scratch / "reference"
    rank = torch.distributed.get_rank()
    missing = missing_rows(folder, len(data))
    torch.distributed.barrier()  # no worker writes before all have read
    if missing:
        journal = Journal(folder, writer=f"rank{rank}")
        batches = dealer.deal(missing, dealer.passes(missing))[rank]
        for row, chosen, rejected in _log_probs(job, objective, data, batches):
            journal.append({"row": row, "chosen": chosen, "rejected": rejected})
        torch.distributed.barrier()
    log_probs = {entry["row"]: entry for entry in Journal(folder).read_new()}
    for name in ("chosen", "rejected"):
        column = [log_probs[row][name] for row in range(len(data))]
        data = data.add_column(f"ref_{name}_logps", column)
    return data


def missing_rows(folder: Path, rows: int) -> list[int]:
    """Returns the numbers of rows without a reference log-probability."""
    finished = {entry["row"] for entry in Journal(folder).read_new()}
    return [row for row in range(rows) if row not in finished]


def _log_probs(
    job: WorkerJob, objective: "Objective", data: Any, batches: list[list[int]]
) -> Iterator[tuple[int, float, float]]:
    """Yields row index, chosen and rejected log-probability. For an empty batch, runs row 0 only to
    take part in the collective, and yields nothing."""
    import torch
    from accelerate.utils import send_to_device

    from zephyr_ray.train.objectives import pair_log_probs
    from zephyr_ray.train.pairs import per_answer

    bf16 = job.settings.precision == "bf16"
    with _reference_model(job) as (model, device):
        unwrapped = getattr(model, "module", model)  # DeepSpeed's engine has another `config`
        # Any ID can pad: the attention mask and the labels exclude padding.
        collate = objective.collator(pad_token_id=0, model=unwrapped)
        for rows in batches:
            batch = send_to_device(collate([data[row] for row in rows or [0]]), device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                output = model(**objective.inputs(batch), fused_lm_head=True)
                chosen, rejected = pair_log_probs(per_answer(output, batch))
            yield from zip(rows, chosen.tolist(), rejected.tolist(), strict=False)


@contextmanager
def _reference_model(job: WorkerJob) -> Iterator[tuple[Any, str]]:
    """Yields the reference model, on this worker's device or split over all workers, and the
    device."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.settings.zero != 3:
        model = load_model(job.weights, job.settings.is_quantized())
        model = model if getattr(model, "is_quantized", False) else model.to(device)
        add_fused_lm_head(model)
        yield model.eval(), device
        return
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    config = job.settings.forward_config()
    keep = HfDeepSpeedConfig(config)  # from_pretrained shards the weights while this object exists
    model = load_model(job.weights, job.settings.is_quantized())
    add_fused_lm_head(model)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # returns None, so it cannot be chained
    yield engine, device
    engine.destroy()
    unset_hf_deepspeed_config()
    del keep
