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
    """Starts the workers, which run the jobs one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{server.getsockname()[1]}"}
    world["WORLD_SIZE"] = f"{workers}"
    ranks = [world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(workers)]
    started = [FORKSERVER.Process(target=_run, args=(jobs, rank)) for rank in ranks]
    for process in started:
        process.start()
    return started


def train(*jobs: WorkerJob, workers: int = 1) -> None:
    """Runs the jobs to their ends."""
    started = start(*jobs, workers=workers)
    for process in started:
        process.join(LIMIT)
        process.kill()
    refused = any(job.refusal.exists() for job in jobs)
    assert refused or [process.exitcode for process in started] == [0] * workers


def train_until_checkpoint(job: Job) -> None:
    """Kills the training after it has recorded its first checkpoint."""
    [process] = start(job)
    while process.is_alive() and not (job.checkpoints / "last_checkpoint").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the training ended before the kill"


@contextmanager
def in_place_of_ray() -> Iterator[None]:
    """Makes stages train in these processes, as many as a stage has workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "connect", lambda: None)
        patch.setattr(
            workers, "_fit", lambda _, job: train(job, workers=job.settings.workers.least)
        )
        yield


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
