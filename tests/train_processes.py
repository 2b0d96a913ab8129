"""Runs training jobs in processes without Ray. They are forked from a process that has imported the
libraries, because importing them takes longer than a small training run."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess

import pytest

from zephyr_ray.train import workers
from zephyr_ray.train.job import Job, WorkerJob

LIMIT = 600
"""Seconds after which a job is given up."""
FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["deepspeed", "zephyr_ray.train.trainer"])


def start(*jobs: WorkerJob, workers: int = 1) -> list[ForkServerProcess]:
    """Starts the workers, which run the jobs one after the other. A single one gets no process
    group, as in a plain process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{server.getsockname()[1]}"}
    world["WORLD_SIZE"] = f"{workers}"
    ranks = [world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(workers)]
    ranks = ranks if workers > 1 else [{}]
    started = [FORKSERVER.Process(target=_run, args=(jobs, rank), daemon=True) for rank in ranks]
    for process in started:
        process.start()
    return started


def train(*jobs: WorkerJob, workers: int = 1) -> None:
    """Runs the jobs to their ends."""
    assert _exit_codes(jobs, workers) == [0] * workers


def train_until_checkpoint(job: Job) -> None:
    """Kills the training after it has recorded its first checkpoint."""
    recorded, deadline = job.checkpoints / "last_checkpoint", time.monotonic() + LIMIT
    [process] = start(job)
    try:
        while process.is_alive() and not recorded.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert recorded.exists() and process.exitcode == -signal.SIGKILL, "not killed in mid-training"


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


def _exit_codes(jobs: tuple[WorkerJob, ...], count: int) -> list[int | None]:
    """Runs the jobs until all workers have ended, one has failed, or LIMIT."""
    started, deadline = start(*jobs, workers=count), time.monotonic() + LIMIT
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


def _run(jobs: tuple[WorkerJob, ...], environment: dict[str, str]) -> None:
    os.environ |= environment
    from accelerate.state import AcceleratorState

    from zephyr_ray.train import worker
    from zephyr_ray.train.context import ProcessContext

    for job in jobs:
        context = ProcessContext(job.checkpoints)
        worker.RayContext = lambda context=context: context
        worker.run_worker({"job": job})
        # Otherwise the next job would get this one's DeepSpeed configuration.
        AcceleratorState._reset_state(reset_partial_state=True)
