"""Runs training jobs in processes without Ray. They are forked from a process that has imported the
libraries, because importing them takes longer than a small training run."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from ports import free_port

from zephyr_ray.train import workers
from zephyr_ray.train.context import ProcessContext
from zephyr_ray.train.job import Job, WorkerJob

LIMIT = 1000
"""Seconds after which a job is given up."""
FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["deepspeed", "zephyr_ray.train.trainer"])


class KilledContext(ProcessContext):
    """Kills its process once the second checkpoint is written and the first one recorded."""

    def report(self, step: int, checkpoint: Path | None) -> None:
        if self.last_checkpoint():
            os.kill(os.getpid(), signal.SIGKILL)
        super().report(step, checkpoint)


def start(
    *jobs: WorkerJob, workers: int = 1, context: type[ProcessContext] = ProcessContext
) -> list[ForkServerProcess]:
    """Starts the workers, which run the jobs one after the other. A single one gets no process
    group, as in a plain process."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    world["WORLD_SIZE"] = f"{workers}"
    ranks = [world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(workers)]
    started = [
        FORKSERVER.Process(target=_run, args=(jobs, rank, context), daemon=True)
        for rank in (ranks if workers > 1 else [{}])
    ]
    for process in started:
        process.start()
    return started


def train(
    *jobs: WorkerJob, workers: int = 1, context: type[ProcessContext] = ProcessContext
) -> None:
    """Runs the jobs to their ends."""
    assert _exit_codes(jobs, workers, context) == [0] * workers


def train_until_checkpoint(job: Job) -> None:
    """Trains until the process is killed between its first two checkpoints."""
    assert _exit_codes((job,), 1, KilledContext) == [-signal.SIGKILL]


@contextmanager
def in_place_of_ray() -> Iterator[None]:
    """Makes stages train in these processes, as many as a stage has workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "connect", lambda: None)
        patch.setattr(workers, "_fit", lambda _, job: _fit(job))
        yield


def _fit(job: WorkerJob) -> None:
    count = job.settings.workers.least
    assert _exit_codes((job,), count) == [0] * count or job.refusal.exists()


def _exit_codes(
    jobs: tuple[WorkerJob, ...], count: int, context: type[ProcessContext] = ProcessContext
) -> list[int | None]:
    """Runs the jobs until all workers have ended, one has failed, or LIMIT."""
    started = start(*jobs, workers=count, context=context)
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            # The others would wait for a worker that has failed.
            if any(process.exitcode for process in started):
                break
            time.sleep(0.02)
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()


def _run(
    jobs: tuple[WorkerJob, ...], environment: dict[str, str], context_type: type[ProcessContext]
) -> None:
    os.environ |= environment
    from accelerate.state import AcceleratorState

    from zephyr_ray.train import worker

    for job in jobs:
        context = context_type(job.checkpoints)
        worker.RayContext = lambda context=context: context
        worker.run_worker({"job": job})
        # Otherwise the next job would get this one's DeepSpeed configuration.
        AcceleratorState._reset_state(reset_partial_state=True)
