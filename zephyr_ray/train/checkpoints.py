"""Checkpoints of an interrupted run: which one training resumes from, and what is discarded."""

import json
import logging
import shutil
from pathlib import Path

from zephyr_ray.train.job import Job

log = logging.getLogger("zephyr_ray")


def discard_torn_state(job: Job) -> None:
    """Removes Ray's run state if a kill left it half written (Ray writes it in place, and could not
    read it again). Runs on the driver."""
    state = job.checkpoints / "checkpoint_manager_snapshot.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        log.warning("the state of the interrupted run is half written; training starts from step 1")
        state.unlink()


def last_checkpoint(job: Job) -> str | None:
    """Returns the last checkpoint that all workers reported, and removes all others, which may be
    half written. Runs on every worker."""
    import ray.train
    import torch.distributed

    reported = ray.train.get_checkpoint()
    context = ray.train.get_context()
    if reported and not fits(Path(reported.path), job.settings.zero, context.get_world_size()):
        log.warning(
            "the checkpoint was written with another number of workers or another zero; training "
            "starts from step 1"
        )
        reported = None
    kept = Path(reported.path).name if reported else None
    if context.get_world_rank() == 0:
        for path in job.checkpoints.glob("checkpoint-*"):
            if path.name != kept:
                shutil.rmtree(path, ignore_errors=True)
    torch.distributed.barrier()
    return str(reported.path) if reported else None


def fits(checkpoint: Path, zero: int, workers: int) -> bool:
    """Returns whether DeepSpeed wrote the checkpoint at this ZeRO stage with this many workers.

    Without ZeRO one file holds everything, for any number of workers. Stages 1 and 2 write a part
    of the optimizer per worker, stage 3 also a part of the model.
    """
    optimizers = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    models = len(list(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")))
    return (optimizers, models) == (workers if zero else 0, workers if zero == 3 else 0)
