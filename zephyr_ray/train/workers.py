"""Runs jobs on Ray Train workers: the driver's side.

The driver prepares rows and a job (plain values) and calls `train` or `run_workers`. Workers answer
through files on storage: steps or rows in a journal, state in checkpoints, a permanent error in a
file of its own.
"""

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import number, percent
from zephyr_ray.ray_cluster import connect
from zephyr_ray.stage import Work, log
from zephyr_ray.store import Journal, write_rows
from zephyr_ray.train.checkpoints import RAY_RECORD, UNFIT, fits, remove_checkpoints
from zephyr_ray.train.failures import died, kernel_kills, ran_out_of_memory
from zephyr_ray.train.job import VALIDATION, Job, WorkerJob
from zephyr_ray.train.reference import JOURNAL
from zephyr_ray.train.worker import run_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

ATTEMPTS = 3
"""Maximum attempts in a row that add no checkpoint and no row to a stage."""
RESIZE_SECONDS = 300
"""Seconds between two checks for room for more workers; adding some costs the steps since the last
checkpoint."""
STEPS = "metrics.jsonl"
GROWING_SEGMENTS = {"env_vars": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}
"""Runtime environment in which PyTorch's GPU allocator reserves little more than it needs, although
batches differ in length (benchmarks/RESULTS.md)."""


def train(work: Work, job: Job) -> None:
    """Runs the job to its end: writes model/ and metrics.jsonl, counts steps and the final loss."""

    def note(row: dict[str, Any]) -> None:
        # After a resume, steps repeat from the checkpoint on.
        work.progress.resumed = min(work.progress.resumed, max(0, row["step"] - 1))
        work.progress.done = row["step"]
        work.progress.note = validation_note(row) or work.progress.note
        metrics = {key: value for key, value in row.items() if key not in ("step", "steps")}
        work.log_metrics(metrics, row["step"])

    work.progress.unit, work.progress.total = "steps", job.steps
    run_workers(work, job, "steps", note)
    entries = {row["step"]: row for row in work.journal("steps").read_new()}
    rows = [entries[step] for step in sorted(entries)]
    write_rows(work.folder, rows, STEPS)
    steps = [row for row in rows if row["step"] > 0]  # step 0 measures the start model
    tail = steps[-max(1, len(steps) // 10) :]
    work.counts["steps"] = len(steps)
    work.counts |= {name: value for name, value in steps[-1].items() if name.startswith(VALIDATION)}
    sequences = work.counts.get("sequences", work.counts["rows"])
    in_epochs = math.ceil(job.settings.epochs * sequences)
    work.counts["repeated_to_fill_the_last_step"] = len(job.order) - in_epochs
    shares = [row.get("real_token_share", 1.0) for row in steps]  # absent without padding
    work.counts["real_token_share"] = sum(shares) / len(shares)
    work.counts["train/loss_final"] = sum(row["loss"] for row in tail) / len(tail)


def run_workers(
    work: Work, job: WorkerJob, journal: str, note: Callable[[dict[str, Any]], None]
) -> None:
    """Runs the job to its end on all workers, and passes every entry of their journal to `note`.

    Call it from the main thread, because Ray Train replaces the interrupt handler.
    """
    connect()
    job.refusal.unlink(missing_ok=True)
    with _followed(work, work.journal(journal), note), _interrupt_restored():
        _fit(work.name, job)
    if job.refusal.exists():
        raise Permanent(job.refusal.read_text(encoding="utf-8"))


def _fit(name: str, job: WorkerJob) -> None:
    """Runs the rest of the job; retries if a worker fails. Raises Permanent if memory is
    short, because a retry would end in the same way, or if workers died in the last attempt."""
    attempt, kept = 0, _kept(job)
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    savings = job.settings.memory_savings()
    while True:
        attempt += 1
        _discard_useless_state(job)
        kills = kernel_kills()
        try:
            _trainer(job).fit()
            return
        except (RayError, TrainingFailedError) as error:
            log.debug("attempt %d failed", attempt, exc_info=True)
            if job.refusal.exists():
                return
            if ran_out_of_memory(error) or (died(error) and kernel_kills() > kills):
                raise Permanent(f"stage '{name}': a worker ran out of memory; {savings}") from error
            if _kept(job) != kept:  # a cluster may lose many workers in a long run
                attempt, kept = 0, _kept(job)
            if attempt == ATTEMPTS and died(error):
                raise Permanent(
                    f"stage '{name}': workers died {ATTEMPTS} times, perhaps killed for "
                    f"lack of memory; {savings}"
                ) from error
            if attempt == ATTEMPTS:
                raise


def _kept(job: WorkerJob) -> tuple[int, bytes]:
    """Returns what changes when a job saves progress for its next attempt: the total size of the
    journals of log-probabilities, and Ray's list of checkpoints."""
    folders = job.scratch, job.scratch / "validation" / "scratch"
    journals = [path for folder in folders for path in (folder / JOURNAL).glob("*.jsonl")]
    state = _run_state(job)
    checkpoints = state.read_bytes() if state.exists() else b""
    return sum(path.stat().st_size for path in journals), checkpoints


def _run_state(job: WorkerJob) -> Path:
    """Returns the file in which Ray Train lists the reported checkpoints."""
    return job.checkpoints / RAY_RECORD


def _trainer(job: WorkerJob) -> "TorchTrainer":
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    settings, gpus = job.settings, job.settings.gpus_per_worker
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=settings.workers.for_ray(),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": gpus},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            # Ray requires its run state and the checkpoints that it names in one folder.
            name=job.checkpoints.name,
            storage_path=str(job.scratch.absolute()),
            worker_runtime_env=GROWING_SEGMENTS if gpus else {},
            # `_fit` decides which failures are worth another attempt.
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )


def _discard_useless_state(job: WorkerJob) -> None:
    """Removes Ray's run state if its writer was killed halfway (Ray writes it in place, and could
    not read it again), and with its checkpoints if the job cannot resume from the last one: Ray
    would later delete a new checkpoint of the same name, or fail to delete the missing one."""
    state = _run_state(job)
    try:
        last = json.loads(state.read_text(encoding="utf-8")).get("latest_checkpoint_result")
    except FileNotFoundError:
        return
    except ValueError:
        log.warning("the state of the interrupted run is half written; training starts from step 1")
        state.unlink()
        return
    if last and not fits(job.checkpoints / last["checkpoint_dir_name"], job.settings.zero):
        log.warning(UNFIT)
        remove_checkpoints(job.checkpoints, keep=None)


@contextmanager
def _followed(
    work: Work, journal: Journal, note: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Passes the journal's entries to `note` while the context is open."""
    finished = threading.Event()

    # Includes entries of a killed attempt, which may not have sent its last ones to MLflow.
    for entry in journal.read_new():
        note(entry)
    work.progress.resumed = work.progress.done

    def follow() -> None:
        while True:
            last = finished.wait(0.5)
            for entry in journal.read_new():
                note(entry)
            if last:
                return

    thread = threading.Thread(target=follow, name=f"follow-{work.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def validation_note(row: dict[str, Any]) -> str:
    """Returns the loss and accuracy of held-out rows after a step; empty if none were measured."""
    if f"{VALIDATION}loss" not in row:
        return ""
    accuracies = (f"{VALIDATION}{name}" for name in ("rewards/accuracies", "mean_token_accuracy"))
    accuracy = next(row[name] for name in accuracies if name in row)
    return f"validation loss {number(row[f'{VALIDATION}loss'], 3)}, accuracy {percent(accuracy)}"


@contextmanager
def _interrupt_restored() -> Iterator[None]:
    """Restores the handler of Ctrl-C, which Ray Train replaces permanently."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
