"""Tests that training is the same however a step is split over workers and forward passes. Uses
processes with DeepSpeed, without Ray."""

import random
from pathlib import Path
from typing import Any

import pytest
import train_once
from train_processes import train

from zephyr_ray.store import read_jsonl
from zephyr_ray.train.batches import Dealer, micro_batches
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import load_config
from zephyr_ray.train.packing import open_data
from zephyr_ray.train.sft import Sft

COMMON = {
    "model": "base",
    "data": "data",
    "epochs": 2,
    "global_batch": 5,
    "learning_rate": 1e-4,
    "schedule": "constant_with_warmup",
    "warmup": 0,
    "checkpoint_every": 3,
    "max_length": 128,
    "precision": "fp32",
}
STAGES = {"sft": (Sft, {"packing": False}), "dpo": (Dpo, {"nll_weight": 0.5, "beta": 0.3})}


def dialogue(number: int) -> dict[str, Any]:
    """Returns a dialogue. All have about the same length, so no micro-batch holds two."""
    pick = random.Random(number)
    words = pick.choices(train_once.WORDS, k=8), pick.choices(train_once.WORDS, k=8 + number % 4)
    texts = [" ".join(part) for part in words]
    roles = ("user", "assistant")
    return {
        "id": f"{number}",
        "messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)],
    }


def rows(kind: str) -> list[dict[str, Any]]:
    chosen = [dialogue(number) for number in range(15)]
    if kind == "sft":
        return chosen
    return [
        {
            "id": row["id"],
            "chosen": row["messages"],
            "rejected": [row["messages"][0], dialogue(100 + number)["messages"][1]],
        }
        for number, row in enumerate(chosen)
    ]


def dealer(stage: Any, weights: str, scratch: Path, capacity: int, workers: int) -> Dealer:
    data = open_data(scratch / "data")
    made: Dealer = stage.objective().dealer(load_config(weights), data, capacity, workers)
    return made


@pytest.fixture(scope="module", params=["sft", "dpo"])
def make(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Returns a function that makes a training job with its data."""
    kind, settings = STAGES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    work = train_once.work_for(folder, tiny_model, rows(request.param))
    stage = kind(**COMMON, **settings)
    stage.prepare(work)
    longest = max(dealer(stage, str(tiny_model), work.scratch, capacity=1, workers=1).lengths)

    def make(name: str, steps: int = 6, one_pass: bool = False, **settings: Any) -> Job:
        job_folder = folder / name
        if not job_folder.exists():
            (job_folder / "scratch").mkdir(parents=True)
            (job_folder / "scratch" / "data").symlink_to(work.scratch / "data")
        micro_batch = 4096 if one_pass else longest
        chosen = stage.model_copy(update={"micro_batch": micro_batch, **settings})
        order = chosen.order(15)[: steps * 5]
        return Job(settings=chosen, weights=str(tiny_model), folder=job_folder, order=order)

    return make


@pytest.fixture(scope="module")
def whole(make: Any) -> Job:
    """Trains with one worker and one forward pass per step."""
    job: Job = make("whole", one_pass=True, zero=2)
    train(job)
    return job


def steps(job: Job) -> list[dict[str, float]]:
    """Returns the metrics of every step; for a repeated step, those of its last attempt."""
    entries = {entry["step"]: entry for entry in read_jsonl(job.scratch / "steps" / "rank0.jsonl")}
    return [entries[number] for number in sorted(entries)]


def check_same(job: Job, expected: Job) -> None:
    """Compares losses, gradient norms, metrics and weights. Absolute tolerances are needed because
    some metrics are differences of large numbers."""
    from safetensors.torch import load_file

    for step, other in zip(steps(job), steps(expected), strict=True):
        for name in step.keys() - {"seconds", "steps", "epoch", "workers"}:
            relative, absolute = (1e-5, 0) if name == "grad_norm" else (1e-6, 2e-5)
            absolute = 2e-6 if name == "loss" else absolute
            assert step[name] == pytest.approx(other[name], rel=relative, abs=absolute), name
        assert {"loss", "grad_norm", "entropy"} <= step.keys() == other.keys()
    made, same = (load_file(j.folder / "model" / "model.safetensors") for j in (job, expected))
    names = made.keys() & same.keys()  # ZeRO 3 does not write tied weights twice
    differences = {name: (made[name] - same[name]).abs().max().item() for name in names}
    # Six steps change weights by up to 6e-4; Adam amplifies rounding where gradients are near 0.
    assert max(differences.values()) < 5e-6, differences


def test_two_workers_train_as_one(make: Any, whole: Job) -> None:
    """Two workers share five rows in three passes each, so one pass is empty."""
    zero = 3 if whole.settings.kind == "sft" else 2
    job = make("two", zero=zero, workers=2)
    for_two = dealer(job.settings, job.weights, job.scratch, job.settings.micro_batch, workers=2)
    dealt = [micro_batches(job.order, 5, for_two, rank) for rank in (0, 1)]
    assert {len(part.rows) for worker in dealt for step in worker for part in step} == {0, 1}
    train(job, workers=2)
    check_same(job, whole)


def test_training_can_resume_with_another_number_of_passes(make: Any, whole: Job) -> None:
    """Runs four steps of five passes, one of them after the checkpoint; then one pass per step."""
    train(make("resumed", steps=4, zero=2))
    job = make("resumed", one_pass=True, zero=2)
    assert (job.checkpoints / "last_checkpoint").read_text() == "checkpoint-3"
    train(job)
    numbers = [entry["step"] for entry in read_jsonl(job.scratch / "steps" / "rank0.jsonl")]
    assert numbers == [1, 2, 3, 4, 4, 5, 6]
    check_same(job, whole)
