"""Tests the one line about workers that ran out of memory or died, with real Ray workers."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import train_once
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError

from zephyr_ray.errors import Permanent
from zephyr_ray.train import workers
from zephyr_ray.train.failures import died, kernel_kills, ran_out_of_memory
from zephyr_ray.train.sft import Sft

MEBIBYTE = 2**20


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
def test_the_cause_is_found_in_every_wrapping(error: Exception, memory: bool, dead: bool) -> None:
    of_one_worker = WorkerGroupError("", {0: KeyError("collateral"), 3: error})
    for wrapped in (error, of_one_worker, ControllerError(error), ControllerError(of_one_worker)):
        assert (ran_out_of_memory(wrapped), died(wrapped)) == (memory, dead)


def test_the_kernels_counter_is_read() -> None:
    [line] = [t for t in Path("/proc/vmstat").read_text().splitlines() if t.startswith("oom_kill ")]
    assert kernel_kills() >= int(line.split()[1])


@pytest.mark.parametrize(
    ("settings", "savings"),
    [
        ({}, "lower micro_batch or max_length, set gradient_checkpointing: true, or use a"),
        ({"micro_batch": 1, "gradient_checkpointing": True}, "lower max_length, or use a"),
        ({"workers": 2, "micro_batch": 1}, "lower workers or max_length, set"),
    ],
)
def test_only_settings_that_can_be_lowered_are_named(
    settings: dict[str, Any], savings: str
) -> None:
    stage = Sft(model="m", data="d", **settings)
    assert stage.memory_savings().startswith(savings)


def hog(config: dict[str, Any]) -> None:
    with (config["job"].scratch / "attempts").open("a") as attempts:
        attempts.write("x")
    held = []
    for _ in range(60):
        held.append(bytearray(b"x") * (100 * MEBIBYTE))
        time.sleep(0.1)
    raise AssertionError("Ray's memory monitor did not kill this worker")


def killed(config: dict[str, Any]) -> None:
    with (config["job"].scratch / "attempts").open("a") as attempts:
        attempts.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("loop", "attempts", "says"),
    [
        (hog, 1, "stage 'train': training ran out of memory; lower micro_batch or max_length, set"),
        (killed, 3, "stage 'train': training workers died 3 times, perhaps killed for lack of"),
    ],
)
def test_a_killed_worker_is_one_line_that_names_settings(
    loop: Any,
    attempts: int,
    says: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's monitor kills a worker that needs more than 3 GB beside what the machine uses now."""
    memory = psutil.virtual_memory()
    if memory.available < 5e9:
        pytest.skip("needs 5 GB of free memory")
    share = (memory.total - memory.available + 3e9) / memory.total
    monkeypatch.setattr(workers, "run_worker", loop)
    system = {"memory_usage_threshold": share, "memory_monitor_refresh_ms": 100}
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    if loop is hog:
        options["_system_config"] = system
    ray.init("local", num_cpus=2, **options)
    try:
        with pytest.raises(Permanent, match=says):
            train_once.sft(tmp_path, tiny_model, zero=0)
    finally:
        ray.shutdown()
    assert (tmp_path / "made" / "scratch" / "attempts").read_text() == "x" * attempts
