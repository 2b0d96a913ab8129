"""Log-probabilities of preference pairs under the frozen reference, computed once before training.

Every worker scores its share with the plain start model, before there is an engine, and writes each
pair down; a restart scores only what is missing. TRL's own precomputation keeps its results in a
folder of one rank and starts from zero.
"""

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
        _score(job, data, missing[rank::world], Journal(folder, writer=f"rank{rank}"))
        torch.distributed.barrier()
    scores = {entry["row"]: entry for entry in Journal(folder).new()}
    for name in ("chosen", "rejected"):
        column = [scores[row][name] for row in range(len(data))]
        data = data.add_column(f"ref_{name}_logps", column)
    return data


def _score(job: Job, data: Any, rows: list[int], journal: Journal) -> None:
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(job).to(device).eval()
    add_fused_lm_head(model)
    collate = DataCollatorForPreference(pad_token_id=0)
    size = job.settings.batches()[0]
    low = job.settings.precision == "bf16"
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
        for at in range(0, len(rows), size):
            batch = collate([data[row] for row in rows[at : at + size]])
            ids = batch["input_ids"].to(device)
            labels = ids.masked_fill(batch["completion_mask"].to(device) == 0, -100)
            mask = batch["attention_mask"].to(device)
            found = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
            chosen, rejected = found.float().sum(dim=1).chunk(2)
            for row, a, b in zip(rows[at:], chosen.tolist(), rejected.tolist(), strict=False):
                journal.append({"row": row, "chosen": a, "rejected": b})
