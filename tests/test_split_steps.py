"""Training is the same however a step is split over workers and forward passes. Plain processes
with DeepSpeed, no Ray."""

import os
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train_once
from datasets import load_from_disk

from zephyr_ray.store import read_jsonl
from zephyr_ray.train.batches import micro_batches
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import load_chat, load_config
from zephyr_ray.train.sft import Sft

COMMON = {
    "model": "base",
    "data": "data",
    "epochs": 2,
    "global_batch": 5,
    "learning_rate": 1e-4,
    "max_length": 128,
    "precision": "fp32",
    "max_grad_norm": 0.5,  # below the gradients' norm, so that it matters
}
STAGES = {"sft": (Sft, {"packing": False}), "dpo": (Dpo, {"nll_weight": 0.5, "beta": 0.3})}


def dialogue(number: int) -> dict[str, Any]:
    """Dialogues of similar lengths: two do not fit into a micro-batch for the longest one."""
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


def train(job: Job, processes: int) -> None:
    """Runs the job in processes of their own."""
    job.scratch.mkdir(exist_ok=True)
    (job.folder / "job").write_bytes(pickle.dumps(job))
    root = Path(__file__).resolve().parents[1]
    program = [sys.executable, str(root / "tests" / "train_plain.py"), str(job.folder / "job")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{processes}"}
    ranks = [env | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(processes)]
    running = [subprocess.Popen(program, env=env) for env in ranks]
    assert [process.wait(timeout=120) for process in running] == [0] * processes


@pytest.fixture(scope="module", params=["sft", "dpo"])
def make(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A function that makes the job of a training with its data."""
    kind, settings = STAGES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    work = train_once.work_for(folder, tiny_model, rows(request.param))
    stage = kind(**COMMON, **settings)
    longest = max(stage.prepare(work, load_chat(str(tiny_model)), work.inputs["data"].rows()))

    def make(name: str, passes: str, **settings: Any) -> Job:
        (folder / name / "scratch").mkdir(parents=True)
        (folder / name / "scratch" / "data").symlink_to(work.scratch / "data")
        capacity = 4096 if passes == "one" else longest
        chosen = stage.model_copy(update={"micro_batch": capacity, **settings})
        order = chosen.order(15)
        return Job(settings=chosen, weights=str(tiny_model), folder=folder / name, order=order)

    return make


@pytest.fixture(scope="module")
def whole(make: Any) -> Job:
    """One worker that makes one forward pass per step."""
    job: Job = make("whole", passes="one", zero=0)
    train(job, processes=1)
    return job


def steps(job: Job) -> list[dict[str, float]]:
    """Metrics of every step, without the norm of the gradients, which ZeRO 2 and 3 do not log."""
    entries = {entry["step"]: entry for entry in read_jsonl(job.scratch / "steps" / "rank0.jsonl")}
    skip = ("seconds", "grad_norm")
    return [{k: v for k, v in entries[n].items() if k not in skip} for n in sorted(entries)]


def has_empty_micro_batch(job: Job) -> bool:
    data, settings = load_from_disk(str(job.scratch / "data")), job.settings
    dealer = settings.objective().dealer(
        load_config(job.weights), data, settings.micro_batch, settings.workers
    )
    dealt = [micro_batches(job.order, 5, dealer, rank) for rank in range(settings.workers)]
    return any(not part.rows for worker in dealt for step in worker for part in step)


@pytest.mark.parametrize(("workers", "zero"), [(1, 0), (2, 2), (2, 3)])
def test_steps_are_the_same(workers: int, zero: int, make: Any, whole: Job) -> None:
    """Two workers share five pairs or dialogues in three passes, of which one is empty."""
    from safetensors.torch import load_file

    job = make(f"{workers}-{zero}", passes="many", zero=zero, workers=workers)
    assert has_empty_micro_batch(job) == (workers == 2)
    train(job, processes=workers)
    bad = []
    for step, expected in zip(steps(job), steps(whole), strict=True):
        assert step.keys() == expected.keys()
        bad += [
            (k, abs(step[k] - expected[k]), expected[k])
            for k in step
            if step[k] != pytest.approx(expected[k], rel=1e-6, abs=1e-6)
        ]
    made, expected, start = (
        load_file(folder / "model.safetensors")
        for folder in (job.folder / "model", whole.folder / "model", Path(job.weights))
    )
    differences = {
        n: (
            float((w - expected[n]).abs().max()),
            float((w - start[n]).abs().max()),
            float((w - expected[n]).norm() / (w - start[n]).norm()),
        )
        for n, w in made.items()
    }
    print("RESULT", workers, zero, bad, differences)
