"""Follows training from inside a worker: checks the engine and the loss, writes steps, reports
checkpoints and resumes from them.

Imports transformers: import this module only in a worker.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import TrainerCallback

from zephyr_ray.errors import Permanent
from zephyr_ray.stage import log
from zephyr_ray.store import Journal
from zephyr_ray.train.checkpoints import UNFIT, fits, remove_checkpoints
from zephyr_ray.train.context import Context
from zephyr_ray.train.job import Job
from zephyr_ray.train.resharding import fit_to_workers
from zephyr_ray.train.validation import Validation


class Reporter(TrainerCallback):
    """Writes steps to the job's journal (rank 0) and reports checkpoints (all ranks)."""

    def __init__(
        self,
        job: Job,
        trainer: Any,
        context: Context,
        rank: int,
        validation: Validation | None = None,
    ):
        self.job, self.trainer, self.context = job, trainer, context
        self.validation = validation
        self.journal = Journal(job.scratch / "steps", writer="rank0") if rank == 0 else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        engine = self.trainer.model_wrapped
        refuse_other_engines(engine, self.job.settings.zero)
        if args.world_size == 1 and self.job.settings.zero == 0:
            # DeepSpeed would copy all gradients twice, to average them over one worker.
            engine.enable_backward_allreduce = False
        if self.validation and state.global_step == 0:
            self._write(0, self.validation.measure())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise Permanent(
                f"the loss is {logs['loss']} at step {state.global_step}; "
                "lower learning_rate, or check the data"
            )
        step, seconds = state.global_step, time.monotonic() - self.started
        # Before the checkpoint of this step, so that a resumed run need not measure it again.
        due = step % self.job.settings.validate_every == 0 or step == self.job.steps
        measured = self.validation.measure() if self.validation and due else {}
        known = {"seconds": seconds, "workers": args.world_size}
        self._write(step, {**known, **logs, **measured})

    def _write(self, step: int, entry: dict[str, float]) -> None:
        if self.journal:
            self.journal.append({"step": step, "steps": self.job.steps, **entry})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.job.steps:
            control.should_save = False  # the trained model is saved next

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.context.report(state.global_step, path)


def refuse_other_engines(engine: Any, zero: int) -> None:
    """Raises Permanent if this is not DeepSpeed's engine at ZeRO stage `zero`.

    The Hugging Face trainer silently ignores the DeepSpeed configuration if it cannot use it.
    """
    import deepspeed

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise Permanent(
            f"training would run on {type(engine).__name__}, not on DeepSpeed: the trainer ignored "
            "the DeepSpeed configuration; install the pinned versions of accelerate, transformers "
            "and deepspeed"
        )
    actual = engine.zero_optimization_stage()
    if actual != zero:
        raise Permanent(
            f"DeepSpeed runs at ZeRO stage {actual}, the recipe asks for {zero}; install the "
            "pinned versions of accelerate, transformers and deepspeed"
        )


def last_checkpoint(job: Job, context: Context) -> Path | None:
    """Returns the last checkpoint that all workers reported, rewritten for the present number of
    workers, and removes all others, which may be half written. Runs on every worker."""
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    last = context.last_checkpoint()
    if last and not fits(last, job.settings.zero):
        log.warning(UNFIT)
        last = None
    torch.distributed.barrier()  # no worker removes files before all have read them
    if rank == 0:
        remove_checkpoints(job.checkpoints, keep=last.name if last else None)
    if last:
        fit_to_workers(last, rank, workers, torch.distributed.barrier)
    torch.distributed.barrier()
    return last
