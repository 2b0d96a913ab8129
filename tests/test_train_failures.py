"""Tests retries after worker deaths, and the error lines for deaths and lack of memory."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError

from zephyr_ray.errors import Permanent
from zephyr_ray.train import workers
from zephyr_ray.train.checkpoints import RAY_RECORD
from zephyr_ray.train.failures import died, kernel_kills, ran_out_of_memory
from zephyr_ray.train.job import Job
from zephyr_ray.train.sft import Sft


@pytest.mark.parametrize(
    ("error", "memory", "dead"),
    [
        (MemoryError(), True, False),
        (
            OutOfMemoryError("1 worker(s) were killed: the node is running low on memory"),
            True,
            False,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True, False),
        (ActorDiedError(), False, True),
        (KeyError("memory"), False, False),
    ],
)
def test_the_cause_is_found_in_every_wrapper(error: Exception, memory: bool, dead: bool) -> None:
    group_error = WorkerGroupError("", {0: KeyError("collateral"), 3: error})
    for wrapped in (error, group_error, ControllerError(error), ControllerError(group_error)):
        assert (ran_out_of_memory(wrapped), died(wrapped)) == (memory, dead)


def test_the_kernels_counter_is_read() -> None:
    [line] = [t for t in Path("/proc/vmstat").read_text().splitlines() if t.startswith("oom_kill ")]
    assert kernel_kills() >= int(line.split()[1])


@pytest.mark.parametrize(
    ("settings", "savings"),
    [
        ({}, "lower micro_batch or max_length, set gradient_checkpointing: true, or use a"),
        ({"micro_batch": 2048, "gradient_checkpointing": True}, "lower max_length, or use a"),
        ({"workers": 2, "micro_batch": 2048}, "lower workers or max_length, set"),
    ],
)
def test_only_settings_that_can_still_save_memory_are_named(
    settings: dict[str, Any], savings: str
) -> None:
    stage = Sft(model="m", data="d", **settings)
    assert stage.memory_savings().startswith(savings)


class Trainer:
    """A trainer that raises the given errors, one per attempt, and then succeeds."""

    def __init__(self, errors: list[Exception]):
        self.errors, self.attempts = errors, 0

    def fit(self) -> None:
        self.attempts += 1
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.parametrize(
    ("errors", "attempts", "says"),
    [
        ([ActorDiedError(), ActorDiedError()], 3, None),
        ([ActorDiedError()] * 3, 3, "'s': workers died 3 times, perhaps killed for lack"),
        ([OutOfMemoryError("running low on memory")] * 3, 1, "'s': a worker ran out of memory"),
        ([ActorDiedError(), WorkerGroupError("", {0: MemoryError()})], 2, "ran out of memory"),
    ],
)
def test_only_failures_that_may_be_temporary_are_retried(
    errors: list[Exception],
    attempts: int,
    says: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = Trainer(list(errors))
    monkeypatch.setattr(workers, "_trainer", lambda job: trainer)
    job = Job(settings=Sft(model="m", data="d"), weights="w", folder=tmp_path, order=[])
    with pytest.raises(Permanent, match=says) if says else nullcontext():
        workers._fit("s", job)
    assert trainer.attempts == attempts


@pytest.mark.parametrize(
    "file",
    [
        "checkpoints/checkpoint_manager_snapshot.json",
        "reference/0.jsonl",
        "validation/scratch/reference/0.jsonl",
    ],
)
def test_progress_resets_the_count_of_failures(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers die eight times; the third and fifth attempt add a checkpoint or a row first."""
    kept = tmp_path / "scratch" / file
    kept.parent.mkdir(parents=True)
    trainer = Trainer([ActorDiedError()] * 9)

    def fit() -> None:
        if trainer.attempts + 1 in (3, 5):
            kept.write_text(json.dumps({"attempts": trainer.attempts * "1"}))
        trainer.fit()

    monkeypatch.setattr(workers, "_trainer", lambda job: SimpleNamespace(fit=fit))
    job = Job(settings=Sft(model="m", data="d"), weights="w", folder=tmp_path, order=[])
    with pytest.raises(Permanent, match="workers died 3 times"):
        workers._fit("s", job)
    assert trainer.attempts == 8


@pytest.mark.parametrize(
    ("files", "zero", "resumes"),
    [
        (["zero_pp_rank_0_mp_rank_00_optim", "zero_pp_rank_0_mp_rank_00_model"], 3, True),
        (["zero_pp_rank_0_mp_rank_00_optim", "zero_pp_rank_0_mp_rank_00_model"], 2, False),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim", "mp_rank_00_model"], 1, True),
        ([], 0, False),  # the folder is gone
    ],
)
def test_ray_starts_without_a_checkpoint_that_cannot_be_resumed(
    files: list[str], zero: int, resumes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray holds what its record lists in memory, and would delete a new checkpoint of that name."""
    job = Job(settings=Sft(model="m", data="d", zero=zero), weights="w", folder=tmp_path, order=[])
    job.checkpoints.mkdir(parents=True)
    record = {"latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint-5", "metrics": {}}}
    (job.checkpoints / RAY_RECORD).write_text(json.dumps(record))
    if files:
        checkpoint = job.checkpoints / "checkpoint-5"
        (checkpoint / "global_step5").mkdir(parents=True)
        (checkpoint / "latest").write_text("global_step5")
        for name in files:
            (checkpoint / "global_step5" / f"{name}_states.pt").touch()
    seen: list[set[str]] = []
    fit = SimpleNamespace(fit=lambda: seen.append({p.name for p in job.checkpoints.iterdir()}))
    monkeypatch.setattr(workers, "_trainer", lambda job: fit)
    workers._fit("s", job)
    assert seen == [{"checkpoint-5", RAY_RECORD} if resumes else set()]


def test_a_kill_by_the_kernel_is_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills, trainer = iter([4, 5]), Trainer([ActorDiedError()])
    monkeypatch.setattr(workers, "_trainer", lambda job: trainer)
    monkeypatch.setattr(workers, "kernel_kills", lambda: next(kills))
    job = Job(settings=Sft(model="m", data="d"), weights="w", folder=tmp_path, order=[])
    with pytest.raises(Permanent, match="'s': a worker ran out of memory; lower micro_batch"):
        workers._fit("s", job)


def test_a_worker_that_ray_kills_for_its_memory_is_one_line(
    tiny_model: Path, tmp_path: Path
) -> None:
    if psutil.virtual_memory().available < 8e9:
        pytest.skip("needs 8 GB of free memory")
    script = Path(__file__).with_name("oom_once.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, tiny_model], capture_output=True, text=True, timeout=900
    )
    assert done.stdout.splitlines()[-1:] == [
        "stage 'train': a worker ran out of memory; lower micro_batch or max_length, set "
        "gradient_checkpointing: true, or use a smaller model"
    ], done.stderr
