"""Log-probabilities of preference pairs under the frozen reference, computed once before training.

Every worker scores its share with the start model, before there is an engine for training, and
writes each pair down; a restart scores only what is missing. With ZeRO-3 the model is split over
the workers here too: one that needs it does not fit on one device. TRL's own precomputation keeps
its results in a folder of one rank and starts from zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zephyr_ray.store import Journal
from zephyr_ray.train.worker import Job, load_model


def with_reference(job: Job, data: Any) -> Any:
    """The data set with `ref_chosen_logps` and `ref_rejected_logps` (natural log, summed)."""
    import ray.train
    import torch.distributed

    folder = job.scratch / "reference"
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    done = {entry["row"] for entry in Journal(folder).new()}
    torch.distributed.barrier()  # nobody writes before all have read
    missing = [row for row in range(len(data)) if row not in done]
    if missing:
        # Longest first, dealt out in turn: equal work, and batches of like length.
        missing.sort(key=lambda row: -sum(data[row]["lengths"]))
        turns = -(-len(missing) // (world * job.settings.batches()[0]))
        _score(job, data, missing[rank::world], turns, Journal(folder, writer=f"rank{rank}"))
        torch.distributed.barrier()
    scores = {entry["row"]: entry for entry in Journal(folder).new()}
    for name in ("chosen", "rejected"):
        column = [scores[row][name] for row in range(len(data))]
        data = data.add_column(f"ref_{name}_logps", column)
    return data


def _score(job: Job, data: Any, rows: list[int], turns: int, journal: Journal) -> None:
    """Scores `rows` in `turns` forward passes, as many on every worker: a split model is gathered
    by all of them at once, so that a worker without rows left goes along with the first row."""
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collate = DataCollatorForPreference(pad_token_id=0)
    size = job.settings.batches()[0]
    low = job.settings.precision == "bf16"
    with _start_model(job) as (model, device):
        for at in range(0, turns * size, size):
            batch = collate([data[row] for row in rows[at : at + size] or [0]])
            ids = batch["input_ids"].to(device)
            labels = ids.masked_fill(batch["completion_mask"].to(device) == 0, -100)
            mask = batch["attention_mask"].to(device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
                out = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            chosen, rejected = out.log_probs.float().sum(dim=1).chunk(2)
            for row, a, b in zip(rows[at:], chosen.tolist(), rejected.tolist(), strict=False):
                journal.append({"row": row, "chosen": a, "rejected": b})


@contextmanager
def _start_model(job: Job) -> Iterator[tuple[Any, str]]:
    """The start model, whole on this worker's device or split over all workers, and the device."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.settings.zero != 3:
        model = load_model(job)
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
    keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained splits what it loads
    model = load_model(job)
    add_fused_lm_head(model)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # which returns nothing
    yield engine, device
    engine.destroy()
    unset_hf_deepspeed_config()
    del keep
