"""Compares training with TRL's on a CPU: SFT and DPO of SmolLM2-135M on rows with the lengths of
UltraChat and UltraFeedback, each run in its own process.

    flock LOCK .venv/bin/python -m benchmarks.train --out FOLDER

Two steps each, of which the second is measured. Takes about half an hour on two cores.
"Workers" compares one worker on one core with two on one core each.
"""

import argparse
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl.trainer.dpo_trainer
import trl.trainer.sft_trainer  # noqa: F401

import zephyr_ray.train.trainer  # noqa: F401
from benchmarks import contestants
from benchmarks.isolated import Isolated
from benchmarks.report import Report
from benchmarks.workload import Size, dialogues, pairs
from zephyr_ray.models.shapes import KNOWN_CONFIGS
from zephyr_ray.models.weights import resolve
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

MODEL = "smollm2-135m-instruct"
BATCH = {"sft": 4, "dpo": 8}
SIZE = Size(
    model={name: value for name, value in KNOWN_CONFIGS[MODEL].items() if type(value) is int},
    sft_length=2048,
    dpo_length=1024,
    sft_batch=BATCH["sft"],
    dpo_batch=BATCH["dpo"],
    micro=4,
    steps=2,
    warmup=1,
)
COMMON = {"model": "m", "data": "d", "zero": 0, "epochs": 2, "checkpoint_every": 10_000}
LIMIT = 1800
"""Maximum seconds per training run; a longer one is killed."""


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report, isolated = Report(out, budget=20 * LIMIT), Isolated(out / "log.txt")
    for name, micro, train in training_runs(resolve(MODEL), Path(tempfile.mkdtemp())):

        def measure(train: Any = train, micro: str = micro) -> None:
            report.training(isolated.run(train, timeout=LIMIT), micro)

        report.section(name, measure)
    report.section("workers", lambda: compare_workers(report, isolated, resolve(MODEL)))


def compare_workers(report: Report, isolated: Isolated, model: Path) -> None:
    """Measures SFT on one core and on two workers with one core each, and the share of perfect
    scaling; also two one-worker runs at the same time, which share only the machine, so
    communication does not explain their slowdown."""

    def train(*worker_counts: int) -> float:
        """Returns the mean seconds per step of concurrent runs with these worker counts."""
        ranks = []
        for workers in worker_counts:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{probe.getsockname()[1]}"}
            world["WORLD_SIZE"] = f"{workers}"
            ranks += [
                partial(train_as, {**world, "RANK": f"{rank}"}, model) for rank in range(workers)
            ]
        with ThreadPoolExecutor(len(ranks)) as pool:
            results = list(pool.map(partial(isolated.run, timeout=LIMIT), ranks))
        return statistics.mean(result.seconds for result in results)

    one, two, apart = train(1), train(2), train(1, 1)
    report.line(
        "SFT on one core per worker",
        **{"one worker, s": one, "two workers, s": two, "share of perfect scaling": one / two / 2},
        **{"two separate runs, s": apart, "share that the machine allows": one / apart},
    )


def train_as(environment: dict[str, str], model: Path) -> contestants.Measured:
    """Trains as the worker that torchrun's environment variables describe."""
    os.environ |= environment | {"LOCAL_RANK": environment["RANK"]}
    stage = Sft(
        **COMMON,
        cpus_per_worker=1,
        workers=int(environment["WORLD_SIZE"]),
        global_batch=BATCH["sft"],
        micro_batch=SIZE.sft_length,
    )
    rows = dialogues(SIZE, SIZE.steps * SIZE.sft_batch * SIZE.sft_length)
    return contestants.ours(SIZE, model, stage, rows, Path(tempfile.mkdtemp()))


def training_runs(model: Path, work: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yields the name, the micro-batch and the function of each training run."""
    rows = {
        "sft": dialogues(SIZE, SIZE.steps * SIZE.sft_batch * SIZE.sft_length),
        "dpo": pairs(SIZE, SIZE.steps * SIZE.dpo_batch),
    }
    common = COMMON | {"cpus_per_worker": torch.get_num_threads()}

    def ours(kind: Any, tokens: int, **settings: Any) -> Any:
        batch = BATCH[kind.kind]
        stage = kind(**common, global_batch=batch, micro_batch=tokens, **settings)
        folder = Path(tempfile.mkdtemp(dir=work))
        return partial(contestants.ours, SIZE, model, stage, rows[kind.kind], folder)

    def trl(train: Any, *settings: Any) -> Any:
        kind = "sft" if train is contestants.trl_sft else "dpo"
        folder = Path(tempfile.mkdtemp(dir=work))
        return partial(train, SIZE, model, rows[kind], folder, *settings)

    yield "DPO ours", "4096 tokens", ours(Dpo, 4096)
    checkpointing = ours(Dpo, 16_384, gradient_checkpointing=True)
    yield "DPO ours, checkpointing", "16384 tokens", checkpointing
    yield "DPO TRL as handbook", "8 rows", trl(contestants.trl_dpo, 8, False, True)
    yield "DPO TRL at its best", "2 rows", trl(contestants.trl_dpo, 2, True, False)
    for tokens in (2048, 4096):
        yield "SFT ours, packed", f"{tokens} tokens", ours(Sft, tokens)
    yield "SFT TRL as handbook", "4 rows", trl(contestants.trl_sft, 4, False, True)
    yield "SFT TRL packed", "2 rows", trl(contestants.trl_sft, 2, True, False)
    yield "SFT TRL unpacked, no checkpointing", "2 rows", trl(contestants.trl_sft, 2, False, False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    main(**vars(parser.parse_args()))
