"""Trains on Ray Train workers: the driver's side.

The driver prepares rows and a job (plain values) and calls `train`. What happens on the way goes
through files on storage: steps into a journal, state into checkpoints.
"""

import json
import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.ray_cluster import connect
from zephyr_ray.stage import Work
from zephyr_ray.store import write_rows
from zephyr_ray.train.worker import Job, run_worker

log = logging.getLogger("zephyr_ray")

STEPS = "metrics.jsonl"


def train(work: Work, job: Job) -> None:
    """Runs the job to its end; leaves model/, metrics.jsonl and the final loss in the counts.

    To be called from the main thread: Ray Train takes the interrupt signal for itself.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    connect()

    settings, gpus = job.settings, job.settings.gpus_per_worker
    settings.batches()
    _forget_torn_state(job.scratch)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": gpus},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            # Ray's run state and the checkpoints it names have to lie in one folder.
            name="checkpoints",
            storage_path=str(job.scratch.absolute()),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with _followed(work, job), _interrupt_restored():
        trainer.fit()
    refused = job.scratch / "refused"
    if refused.exists():
        raise Permanent(refused.read_text(encoding="utf-8"))
    last = {row["step"]: row for row in work.journal("steps").new()}
    steps = [last[step] for step in sorted(last)]
    tail = steps[-max(1, len(steps) // 10) :]
    work.counts["steps"] = write_rows(work.folder, steps, STEPS)
    rows = work.counts.get("sequences", work.counts["rows"])
    wanted = math.ceil(settings.epochs * rows)
    work.counts["repeated_to_fill_the_last_step"] = len(job.order) - wanted
    work.counts["train/loss_final"] = sum(row["loss"] for row in tail) / len(tail)


@contextmanager
def _followed(work: Work, job: Job) -> Iterator[None]:
    """While training runs, shows its steps as progress and logs their metrics."""
    journal, over = work.journal("steps"), threading.Event()
    work.progress.unit, work.progress.total = "steps", job.steps

    def note(row: dict[str, Any]) -> None:
        work.progress.done = row["step"]
        metrics = {key: value for key, value in row.items() if key not in ("step", "steps")}
        work.log_metrics(metrics, row["step"])

    # Those of an attempt that was killed, too: it may not have sent its last ones to MLflow.
    for row in journal.new():
        note(row)
    work.progress.resumed = work.progress.done

    def follow() -> None:
        while True:
            last = over.wait(0.5)
            for row in journal.new():
                # After a resume steps come again from the checkpoint on.
                work.progress.resumed = min(work.progress.resumed, row["step"] - 1)
                note(row)
            if last:
                return

    thread = threading.Thread(target=follow, name=f"follow-{work.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _interrupt_restored() -> Iterator[None]:
    """Ray Train takes Ctrl-C for itself and does not give it back."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _forget_torn_state(scratch: Path) -> None:
    """Ray writes its run state in place: a kill may leave half of it, which it would not read."""
    state = scratch / "checkpoints" / "checkpoint_manager_snapshot.json"
    (scratch / "refused").unlink(missing_ok=True)
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        log.warning("the state of an interrupted run is half written: training starts again")
        state.unlink()
