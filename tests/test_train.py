"""Tests training of a tiny random model with real DeepSpeed, on Ray Train workers and without."""

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import train_once
import train_processes
from train_processes import in_place_of_ray, train_until_checkpoint

from zephyr_ray.blocks import FEW_BLOCKS
from zephyr_ray.errors import Permanent
from zephyr_ray.stage import Work
from zephyr_ray.store import read_jsonl
from zephyr_ray.train import workers
from zephyr_ray.train.data import TokenRows
from zephyr_ray.train.job import Job
from zephyr_ray.train.sft import IGNORED, Sft
from zephyr_ray.train.workers import train

STEPS = 24
"""48 dialogues × 2 epochs / a global batch of 4."""
DPO = {
    "workers": 2,
    "micro_batch": 256,
    "zero": 2,
    "global_batch": 4,
    "epochs": 3.5,
    "learning_rate": 2e-4,
    "max_length": 128,
    "precision": "fp32",
}

Runner = Callable[..., Work]


@pytest.fixture(scope="module")
def one_worker(
    ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Work:
    return train_once.sft(tmp_path_factory.mktemp("ray"), tiny_model, workers=1, zero=0)


@pytest.fixture(scope="module")
def sft(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Returns a function that trains without Ray."""

    def run(**settings: Any) -> Work:
        with in_place_of_ray():
            return train_once.sft(tmp_path_factory.mktemp("sft"), tiny_model, **settings)

    return run


@pytest.fixture(scope="module")
def zero_2(sft: Runner) -> Work:
    """Trains with two workers and two forward passes per step each."""
    return sft(workers=2, micro_batch=96, zero=2)


@pytest.fixture(scope="module")
def zero_3(sft: Runner) -> Work:
    return sft(workers=2, micro_batch=192, zero=3)


@pytest.fixture(scope="module")
def dpo(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return train_once.dpo(tmp_path_factory.mktemp("dpo"), tiny_model, **DPO)


def losses(work: Work) -> list[float]:
    return [row["loss"] for row in read_jsonl(work.folder / "metrics.jsonl")]


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model(torch.arange(3, 60)[None]).logits


def log_probs(model: Any, ids: list[int], labels: list[int]) -> Any:
    """Returns the log-probability of every trained token of one row, by plain transformers."""
    import torch

    predicted = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    tokens = torch.tensor(labels[1:])
    return predicted[tokens != IGNORED, tokens[tokens != IGNORED]]


@pytest.fixture(scope="module")
def by_hand(one_worker: Work, tiny_model: Path) -> tuple[list[float], Any]:
    """Repeats the training in plain PyTorch; returns losses, and the trained model's logits."""
    import torch
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    rows = TokenRows(one_worker.scratch / "data")
    # Two epochs of 48 rows, each shuffled with the generator of the recipe's seed. Order within a
    # step does not matter.
    shuffle, order = random.Random(1), []
    for _ in range(2):
        epoch = list(range(48))
        shuffle.shuffle(epoch)
        order += epoch
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * STEPS), STEPS)
    losses = []
    for step in range(STEPS):
        batch = [rows[row] for row in order[step * 4 : step * 4 + 4]]
        loss = -torch.cat([log_probs(model, r["input_ids"], r["labels"]) for r in batch]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, model(torch.arange(3, 60)[None]).logits


def test_losses_are_those_of_plain_pytorch(
    one_worker: Work, by_hand: tuple[list[float], Any]
) -> None:
    assert losses(one_worker) == pytest.approx(by_hand[0], abs=2e-4)


def test_saved_model_gives_the_logits_of_plain_pytorch(
    one_worker: Work, by_hand: tuple[list[float], Any]
) -> None:
    assert (logits(one_worker.folder / "model") - by_hand[1]).abs().max() < 2e-2


@pytest.mark.parametrize("stage", ["zero_2", "zero_3"])
def test_two_workers_train_like_one(
    one_worker: Work, stage: str, request: pytest.FixtureRequest
) -> None:
    two = request.getfixturevalue(stage)
    assert losses(two) == pytest.approx(losses(one_worker), abs=2e-4)
    saved = logits(two.folder / "model") - logits(one_worker.folder / "model")
    assert saved.abs().max() < 2e-2


def test_loss_goes_down(one_worker: Work) -> None:
    first, *_, last = losses(one_worker)
    assert len(losses(one_worker)) == STEPS and last < first - 1


def test_saved_model_is_fp32_and_complete(zero_3: Work) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    folder = zero_3.folder / "model"
    tensors = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config["pad_token_id"] == tokenizer.pad_token_id != config["eos_token_id"]
    assert tokenizer.chat_template


def test_counts_steps_and_the_mask_are_recorded(one_worker: Work) -> None:
    counts = one_worker.counts
    assert (counts["rows"], counts["sequences"], counts["steps"]) == (48, 48, STEPS)
    assert 0 < counts["trained_tokens"] < counts["tokens"]
    assert counts["real_token_share"] == 1  # rows are joined, not padded
    tail = losses(one_worker)[-2:]
    assert counts["train/loss_final"] == pytest.approx(sum(tail) / 2)
    assert "<|im_end|>" not in (one_worker.folder / "mask.html").read_text()
    assert "&lt;|im_end|&gt;" in (one_worker.folder / "mask.html").read_text()
    assert one_worker.progress.done == one_worker.progress.total == STEPS


def test_a_plain_process_trains_like_a_ray_worker_and_resumes(
    one_worker: Work, tiny_model: Path, tmp_path: Path
) -> None:
    settings = Sft(model="base", data="data", **{**train_once.SFT, "zero": 0})
    order = settings.order(len(TokenRows(one_worker.scratch / "data")))
    job = Job(settings=settings, weights=str(tiny_model), folder=tmp_path, order=order)
    job.scratch.mkdir()
    (job.scratch / "data").symlink_to(one_worker.scratch / "data")
    train_until_checkpoint(job)
    train_processes.train(job)
    entries = list(read_jsonl(job.scratch / "steps" / "rank0.jsonl"))
    assert [entry["step"] for entry in entries].count(1) == 1, "it started from step 1 again"
    resumed = {entry["step"]: entry["loss"] for entry in entries}
    expected = dict(enumerate(losses(one_worker), start=1))
    assert resumed == pytest.approx(expected, abs=1e-5)
    assert (logits(tmp_path / "model") - logits(one_worker.folder / "model")).abs().max() < 1e-4
    assert [path.name for path in job.checkpoints.glob("checkpoint-*")] == ["checkpoint-20"]


def test_adapter_is_merged_into_the_saved_model(sft: Runner, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj"]}
    work = sft(workers=2, zero=3, epochs=0.5, lora=lora)
    start = load_file(tiny_model / "model.safetensors")
    made = load_file(work.folder / "model" / "model.safetensors")
    adapter = load_file(work.folder / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    low = [adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA"]
    change = 8 / 4 * low[0] @ low[1]
    assert change.abs().max() > 1e-4
    assert (made[f"{name}.weight"] - start[f"{name}.weight"] - change).abs().max() < 1e-5
    assert made.keys() == start.keys()


def test_first_dpo_loss_is_log_2(dpo: Work) -> None:
    first = next(read_jsonl(dpo.folder / "metrics.jsonl"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_reference_is_the_start_model(dpo: Work, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    computed = {row["row"]: row for row in dpo.journal("reference").read_new()}
    for number, pair in enumerate(train_once.pairs(12)):
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(pair[side], return_dict=False)[:-1]  # no last \n
            ask = tokenizer.apply_chat_template(
                pair[side][:1], add_generation_prompt=True, return_dict=False
            )
            labels = [IGNORED] * len(ask) + ids[len(ask) :]
            with torch.no_grad():
                by_hand = log_probs(model, ids, labels).sum().item()
            assert computed[number][side] == pytest.approx(by_hand, abs=1e-2)


def test_dpo_reports_rewards_and_separates_the_pairs(dpo: Work) -> None:
    last = list(read_jsonl(dpo.folder / "metrics.jsonl"))[-1]
    assert last["loss"] < math.log(2) and last["rewards/margins"] > 0
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= last.keys()


def test_rows_that_fill_the_last_step_are_counted(dpo: Work) -> None:
    # 3.5 × 12 pairs are 10.5 steps of 4.
    assert (dpo.counts["steps"], dpo.counts["repeated_to_fill_the_last_step"]) == (11, 2)


def no_configuration() -> None:
    pass


def test_ignored_deepspeed_configuration_is_refused(one_worker: Work, tiny_model: Path) -> None:
    settings = Sft(model="base", data="data", zero=2, **train_once.SFT)
    settings.__dict__["deepspeed"] = no_configuration
    work = Work("plain", one_worker.folder.with_name("plain"), 0, {}, {}, {})
    work.scratch.mkdir(parents=True)
    (work.scratch / "data").symlink_to(one_worker.scratch / "data")
    job = Job(settings=settings, weights=str(tiny_model), folder=work.folder, order=[0, 1, 2, 3])
    with in_place_of_ray(), pytest.raises(Permanent, match="not on DeepSpeed"):
        train(work, job)


@pytest.mark.timeout(600)
def test_a_permanent_error_of_one_worker_ends_the_others(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_refuses(config: dict[str, Any]) -> None:
        import torch.distributed

        from zephyr_ray.train import worker

        def refused(job: Job, context: Any) -> None:
            if torch.distributed.get_rank() == 1:
                raise Permanent("worker 1 cannot go on")
            time.sleep(2)
            torch.distributed.barrier()

        worker.train_and_save = refused
        worker.run_worker(config)

    monkeypatch.setattr(workers, "run_worker", one_refuses)
    with pytest.raises(Permanent, match="^worker 1 cannot go on$"):
        train_once.sft(tmp_path, tiny_model, workers=2, zero=0)


def test_a_sharded_reference_equals_an_unsharded_one(
    dpo: Work, tiny_model: Path, tmp_path: Path
) -> None:
    """ZeRO-3 with optimizer state and weights in CPU memory."""
    settings = {"workers": 2, "zero": 3, "offload": "all", "micro_batch": 256, "global_batch": 10}
    settings |= {"epochs": 1, "max_length": 128, "precision": "fp32"}
    with in_place_of_ray():
        split = train_once.dpo(tmp_path, tiny_model, **settings)
    sharded = {row["row"]: row for row in split.journal("reference").read_new()}
    unsharded = {row["row"]: row for row in dpo.journal("reference").read_new()}
    for side in ("chosen", "rejected"):
        expected = [unsharded[row][side] for row in range(12)]
        assert [sharded[row][side] for row in range(12)] == pytest.approx(expected, abs=1e-3)
    assert losses(split)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_offloaded_training_is_the_same(one_worker: Work, sft: Runner) -> None:
    offloaded = sft(workers=2, zero=2, offload="optimizer")
    assert losses(offloaded) == pytest.approx(losses(one_worker), abs=2e-4)


def test_rows_prepared_by_ray_tasks_are_those_of_one_process(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Sft(model="base", data="data", max_length=64)
    work = train_once.work_for(tmp_path, tiny_model, [])
    rows = train_once.dialogues(40)
    rows[30]["messages"] = rows[30]["messages"][:1]
    expected = list(train_once.prepare(stage, work, rows))
    counts, examples = dict(work.counts), dict(work.examples)
    monkeypatch.setattr("zephyr_ray.blocks.BLOCK_LINES", 4)
    assert list(train_once.prepare(stage, work, rows)) == expected
    assert (work.counts, work.examples) == (counts, examples)
    assert len(list((work.scratch / "data").glob("*.npy"))) == 10 > FEW_BLOCKS
    stop = stage.model_copy(update={"bad_rows": "stop"})
    line = "^row '30' of 'data': a conversation has no assistant message to train on; correct it, "
    with pytest.raises(Permanent, match=line):
        train_once.prepare(stop, work, rows)
