"""Tests that one and four workers resume a checkpoint of two workers, at every ZeRO stage."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train_once
from train_processes import train

from zephyr_ray.store import read_jsonl
from zephyr_ray.train.checkpoints import written_by
from zephyr_ray.train.job import Job
from zephyr_ray.train.sft import Sft

CASES: dict[str, dict[str, Any]] = {
    "zero_0": {"zero": 0},
    "zero_1": {"zero": 1, "weight_decay": 0.1},
    "zero_2": {"zero": 2, "offload": "optimizer", "lora": {"r": 4, "dropout": 0}},
    "zero_3": {"zero": 3, "weight_decay": 0.1},
    "zero_3_offload": {"zero": 3, "offload": "all", "lora": {"r": 4, "dropout": 0}},
}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a model whose parameters cannot be split evenly."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(tiny_model)
    config.update({"hidden_size": 42, "intermediate_size": 51, "head_dim": 14})
    config.update({"num_attention_heads": 3, "num_key_value_heads": 1})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


LONG = 2
"""Epochs of the training that loses a node: 24 steps."""
SHORT = {"epochs": 1, "checkpoint_every": 2, "global_batch": 5, "micro_batch": 128}


def make_job(folder: Path, model: Path, count: int, **settings: Any) -> Job:
    rows = train_once.dialogues(count)
    work = train_once.work_for(folder, model, rows)
    stage = Sft(model="base", data="data", **{**train_once.SFT, **settings})
    order = stage.order(len(stage.prepare(work)))
    return Job(settings=stage, weights=str(model), folder=work.folder, order=order)


def copied(job: Job, folder: Path) -> Job:
    shutil.copytree(job.folder, folder)
    shutil.rmtree(folder / "scratch" / "steps")
    return Job(**{**vars(job), "folder": folder})


def steps(job: Job) -> list[dict[str, Any]]:
    return list(read_jsonl(job.scratch / "steps" / "rank0.jsonl"))


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Job]]:
    """Returns jobs by case and number of workers: two train all 4 steps, one and four resume from
    the checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("runs")
    long = make_job(folder / "long", model, 48, zero=3, epochs=LONG)
    jobs = {
        name: {2: make_job(folder / name, model, 20, **SHORT, **case)}
        for name, case in CASES.items()
    }
    train(long, *(job[2] for job in jobs.values()), workers=2)
    for workers in (1, 4):
        for name, job in jobs.items():
            job[workers] = copied(job[2], folder / f"{name}-{workers}")
        train(*(job[workers] for job in jobs.values()), workers=workers)
    return jobs | {"long": {2: long}}


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_an_uninterrupted_run(
    case: str, workers: int, runs: dict[str, dict[int, Job]]
) -> None:
    expected = losses(steps(runs[case][2]))
    assert [*expected] == [1, 2, 3, 4]
    resumed = losses(steps(runs[case][workers]))
    assert resumed == pytest.approx({step: expected[step] for step in (3, 4)}, abs=1e-4)


@pytest.mark.parametrize(("rank", "part"), [(0, [1, 2]), (1, [3, 4]), (2, [5, 0])])
def test_a_part_is_cut_out_of_the_old_parts(rank: int, part: list[float]) -> None:
    """Two workers hold five elements, from index 1 of their flat tensors, and one of padding that
    was never written."""
    import torch

    from zephyr_ray.train.resharding import Split

    flats = [torch.tensor([9.0, 1, 2, 3]), torch.tensor([9.0, 4, 5, math.nan])]
    split = Split(group=0, offset=1, size=5, old=3, new=2)
    assert split.part(flats, rank).tolist() == part


def state(folder: Path) -> dict[str, Any]:
    """Returns the values of a DeepSpeed checkpoint by file, except those that only converters
    read."""
    import torch

    def values(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: values(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [values(item) for item in value]
        return repr(value)

    by_file = {}
    for path in sorted(folder.glob("*_states.pt")):
        loaded = torch.load(path, weights_only=False)
        for name in ("ds_config", "shared_params"):
            loaded.pop(name, None)
        by_file[path.name] = values(loaded)
        by_file[path.name].get("optimizer_state_dict", {}).pop("param_slice_mappings", None)
    return by_file


@pytest.mark.parametrize("case", [case for case in CASES if case != "zero_0"])
def test_rewriting_there_and_back_restores_the_state(
    case: str, runs: dict[str, dict[int, Job]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes via three workers, whose stage 3 parameters are in several sub-groups."""
    from zephyr_ray.train import resharding

    [old] = runs[case][2].checkpoints.glob("checkpoint-2/global_step2")
    there, back = tmp_path / "there", tmp_path / "back"
    there.mkdir()
    back.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(resharding, "SUB_GROUP", 1000)
        for rank in range(3):
            resharding.rewrite(old, there, rank, 3)
    for rank in range(2):
        resharding.rewrite(there, back, rank, 2)
    assert len(state(there)) > len(state(old))
    assert state(back) == state(old)


def test_sub_groups_are_those_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from zephyr_ray.train import resharding

    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 2, "f": 7, "g": 1}
    splits = {name: resharding.Split(0, 0, 0, 0, size) for name, size in sizes.items()}
    parameters = [SimpleNamespace(partition_numel=lambda s=s: s, name=n) for n, s in sizes.items()]
    for limit in (1, 7, 10, 26, 27, 28):
        monkeypatch.setattr(resharding, "SUB_GROUP", limit)
        theirs = DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(
            SimpleNamespace(sub_group_size=limit), parameters
        )
        ours = [*resharding._sub_groups([*sizes], splits)]
        assert ours == [[parameter.name for parameter in group] for group in theirs]


@pytest.mark.parametrize("case", ["zero_1", "zero_3"])
def test_a_kill_during_rewriting_keeps_the_checkpoint(
    case: str, runs: dict[str, dict[int, Job]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zephyr_ray.train import resharding

    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(runs[case][2].checkpoints / "checkpoint-2", checkpoint)
    written, before = written_by(checkpoint), state(checkpoint / "global_step2")

    def killed(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resharding, "_save", killed)
        resharding.fit_to_workers(checkpoint, 0, 1, lambda: None)
    assert written_by(checkpoint) == written == (written[0], 2)
    assert state(checkpoint / "global_step2") == before
    resharding.fit_to_workers(checkpoint, 0, 2, lambda: None)
    assert [path.name for path in checkpoint.glob("global_step*")] == ["global_step2"]
    resharding.fit_to_workers(checkpoint, 0, 1, lambda: None)
    assert [path.name for path in checkpoint.glob("global_step*")] == ["global_step2-1"]
    assert written_by(checkpoint) == (written[0], 1)


def test_every_worker_has_a_random_state(runs: dict[str, dict[int, Job]]) -> None:
    for workers, names in {
        1: ["rng_state.pth"],
        4: [f"rng_state_{n}.pth" for n in range(4)],
    }.items():
        checkpoint = runs["zero_0"][workers].checkpoints / "checkpoint-2"
        first = (checkpoint / "rng_state_0.pth").read_bytes()
        assert (checkpoint / names[0]).read_bytes() == first
        assert {path.name for path in checkpoint.glob("rng_state*")} >= set(names)


def test_training_continues_with_the_remaining_workers(
    runs: dict[str, dict[int, Job]], model: Path, tmp_path: Path
) -> None:
    root = Path(__file__).resolve().parents[1]
    program = [sys.executable, str(root / "tests" / "elastic_once.py")]
    program += [str(tmp_path), str(model), str(LONG)]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    subprocess.run(program, env=env, check=True, timeout=1100)
    rows = list(read_jsonl(tmp_path / "made" / "scratch" / "steps" / "rank0.jsonl"))
    two, alone = ([row["step"] for row in rows if row["workers"] == count] for count in (2, 1))
    assert two == [*range(1, two[-1] + 1)]
    assert 5 < alone[0] <= two[-1] + 1 and alone[0] % 5 == 1  # a checkpoint every 5 steps
    assert alone == [*range(alone[0], 25)]
    assert losses(rows) == pytest.approx(losses(steps(runs["long"][2])), abs=1e-4)
