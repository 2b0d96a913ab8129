"""Computes reference log-probabilities, once per pair.

Every worker runs the reference model (the model that training starts from) on its part of the
pairs, before the training engine exists, and writes each result to a journal; a restart computes
only the missing ones. With ZeRO-3 the reference model too is split over the workers, because it may
not fit on one device. TRL's own precomputation keeps its results in memory until the end and starts
again after a failure.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from zephyr_ray.store import Journal, read_jsonl
from zephyr_ray.train.batches import Dealer
from zephyr_ray.train.data import WithColumns
from zephyr_ray.train.job import Job, WorkerJob
from zephyr_ray.train.model import load_config, load_model

JOURNAL = "reference"
"""Folder below scratch/ with the journals of all workers."""


def add_reference_log_probs(job: Job, data: Any) -> Any:
    """Returns the data set with the columns `ref_chosen_logps` and `ref_rejected_logps`: natural
    logarithms, summed over the answer's tokens. Computes those that `job.reference` lacks."""
    known = {row["id"]: row for row in read_jsonl(job.reference)} if job.reference else {}
    ids = data.ids() if known else [None] * len(data)
    missing = [row for row, name in enumerate(ids) if name not in known]
    computed = compute_log_probs(job, data, missing) if missing else {}
    rows = [known[name] if name in known else computed[row] for row, name in enumerate(ids)]
    names = ("chosen", "rejected")
    return WithColumns(data, {f"ref_{name}_logps": [row[name] for row in rows] for name in names})


def compute_log_probs(job: WorkerJob, data: Any, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Returns the journal's entries by row number, after computing those that it lacks. Runs on
    every worker."""
    import torch.distributed

    from zephyr_ray.train.pairs import pair_lengths, why_not_shared

    folder = job.scratch / JOURNAL
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # The workers exchange entries, because on NFS they may see each other's files late.
    shared = [{entry["row"]: entry for entry in Journal(folder).read_new()}]
    torch.distributed.broadcast_object_list(shared)
    [entries] = shared
    if missing := [row for row in rows if row not in entries]:
        journal = Journal(folder, writer=f"rank{rank}")
        padded = bool(why_not_shared(load_config(job.weights)))
        lengths = pair_lengths(data, padded)
        dealer = Dealer(lengths, job.settings.micro_batch, world_size, padded)
        batches = dealer.deal(missing, dealer.passes(missing))[rank]
        for row, chosen, rejected in _log_probs(job, data, batches):
            name = data[row]["id"]
            entries[row] = {"row": row, "id": name, "chosen": chosen, "rejected": rejected}
            journal.append(entries[row])
        journal.sync()
        parts: list[dict[int, dict[str, Any]]] = [{}] * world_size
        torch.distributed.all_gather_object(parts, entries)
        entries = {row: entry for part in parts for row, entry in part.items()}
    return entries


def _log_probs(
    job: WorkerJob, data: Any, batches: list[list[int]]
) -> Iterator[tuple[int, float, float]]:
    """Yields row number, chosen and rejected log-probability. For an empty batch, runs row 0 only
    to take part in the collective, and yields nothing."""
    import torch
    from accelerate.utils import send_to_device

    from zephyr_ray.train.pairs import model_inputs, pair_collator, pair_log_probs, per_answer

    bf16 = job.settings.precision == "bf16"
    with _reference_model(job) as (model, device):
        unwrapped = getattr(model, "module", model)  # DeepSpeed's engine has another `config`
        # Any ID can pad: the attention mask and the labels exclude padding.
        collate = pair_collator(pad_token_id=0, config=unwrapped.config)
        for rows in batches:
            batch = send_to_device(collate([data[row] for row in rows or [0]]), device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                output = model(**model_inputs(batch), fused_lm_head=True)
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
        # Autocast would hold a bf16 copy of every weight that has gradients.
        yield model.requires_grad_(False).eval(), device
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
