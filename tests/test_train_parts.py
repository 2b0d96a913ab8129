"""Tests the parts of a training worker separately, without running Ray or DeepSpeed: losses,
objectives, arguments, reference, saving."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import train_once

from zephyr_ray.chat import CHATML, ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.store import Journal, read_jsonl
from zephyr_ray.train import cpu, workers
from zephyr_ray.train.checkpoints import RAY_RECORD, RECORD, remove_checkpoints, written_by
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import four_bits, load_model, save, write_model
from zephyr_ray.train.settings import Lora
from zephyr_ray.train.sft import Sft
from zephyr_ray.train.worker import adapter_config, trainer_arguments


def job(folder: Path, **settings: Any) -> Job:
    stage = Sft(model="base", data="data", **settings)
    return Job(settings=stage, weights="", folder=folder, order=list(range(40)))


def output() -> SimpleNamespace:
    """Returns what the model computes for two chosen and two rejected answers of up to 3 tokens."""
    import torch

    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 1, 0]]).bool()
    log_probs = torch.tensor([[-1.0, -2, -3], [0, -1, -3], [-4, -5, 0], [0, -2, 0]])
    top = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).bool()
    return SimpleNamespace(
        log_probs=log_probs,
        label_mask=mask,
        entropy=torch.where(mask, 2.0, 99),
        mean_logits=torch.tensor([[1.0, 1, 1], [99, 2, 2], [3, 3, 99], [99, 6, 99]]),
        is_top1=top,
    )


def reference() -> dict[str, Any]:
    import torch

    return {
        "ref_chosen_logps": torch.tensor([-7.0, -3.0]),
        "ref_rejected_logps": torch.tensor([-8.0, -2.5]),
    }


# From `output` and `reference` by hand: log-ratios of the chosen answers are +1 and -1, of the
# rejected ones -1 and +0.5; β is 0.1.
DPO_LOSSES = [math.log(1 + math.exp(-0.1 * 2)), math.log(1 + math.exp(0.1 * 1.5))]
CHOSEN_NLL = [6 / 3, 4 / 2]


def dpo_losses(**settings: Any) -> tuple[list[float], dict[str, list[float]]]:
    objective = Dpo(model="base", data="data", **settings).objective()
    losses, metrics = objective.losses(output(), reference())
    return losses.tolist(), {name: selected(terms) for name, terms in metrics.items()}


def selected(terms: Any) -> list[float]:
    """Returns the terms of a metric's mean; asserts that the trainer sums and counts the same."""
    kept: list[float] = terms.values.tolist()
    if terms.mask is not None:
        kept = terms.values[terms.mask].tolist()
    assert terms.sum_and_count().tolist() == pytest.approx([sum(kept), len(kept)])
    return kept


def test_sft_loss_is_the_negative_log_likelihood_of_each_trained_token() -> None:
    losses, metrics = Sft(model="base", data="data").objective().losses(output(), {})
    assert losses[output().label_mask].tolist() == [1, 2, 3, 1, 3, 4, 5, 2]
    assert not losses[~output().label_mask].any()
    assert selected(metrics["entropy"]) == [2] * 8
    assert selected(metrics["mean_token_accuracy"]) == [1, 0, 0, 1, 0, 1, 1, 0]
    assert metrics.keys() == {"entropy", "mean_token_accuracy"}


def test_dpo_loss_prefers_the_chosen_answer() -> None:
    assert dpo_losses()[0] == pytest.approx(DPO_LOSSES)


def test_nll_of_chosen_answers_is_added_per_token_with_its_weight() -> None:
    losses, metrics = dpo_losses(nll_weight=0.5)
    both = zip(DPO_LOSSES, CHOSEN_NLL, strict=True)
    assert losses == pytest.approx([dpo + 0.5 * nll for dpo, nll in both])
    assert metrics["nll"] == pytest.approx(CHOSEN_NLL)


def test_dpo_metrics() -> None:
    assert dpo_losses()[1] == {
        "entropy": [2] * 8,
        "logits/chosen": [1, 1, 1, 2, 2],
        "logits/rejected": [3, 3, 6],
        "mean_token_accuracy": [1, 0, 0, 1, 0],
        "rewards/chosen": pytest.approx([0.1, -0.1]),
        "rewards/rejected": pytest.approx([-0.1, 0.05]),
        "rewards/accuracies": [1, 0],
        "rewards/margins": pytest.approx([0.2, -0.15]),
        "logps/chosen": [-6, -4],
        "logps/rejected": [-9, -2],
    }


def model(family: str) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(model_type=family))


@pytest.mark.parametrize(("family", "ids"), [("doge", [[5, 6], [7, 0]]), ("llama", [[5, 6, 7]])])
def test_unpacked_rows_are_padded_only_without_segments(family: str, ids: list[list[int]]) -> None:
    collate = Sft(model="base", data="data", packing=False).objective().collator(0, model(family))
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    assert collate(rows)["input_ids"].tolist() == ids


def test_only_answers_are_labels_in_padded_pairs() -> None:
    objective = Dpo(model="base", data="data").objective()
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    inputs = objective.inputs(objective.collator(pad_token_id=0, model=model("doge"))([row]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert inputs["labels"].tolist() == [[-100, -100, 7, 8], [-100, -100, 9, -100]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("setting", "argument", "value"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing", True),
        ({"gradient_checkpointing": False}, "gradient_checkpointing", False),
        ({"weight_decay": 0.03}, "weight_decay", 0.03),
        ({"max_grad_norm": 0.7}, "max_grad_norm", 0.7),
        ({"schedule": "constant_with_warmup"}, "lr_scheduler_type", "constant_with_warmup"),
        ({"schedule": "linear"}, "lr_scheduler_type", "linear"),
        ({"warmup": 0.25}, "warmup_steps", 3),  # of 10 steps, rounded up
        ({"learning_rate": 0.004}, "learning_rate", 0.004),
        ({"seed": 7}, "seed", 7),
        ({"checkpoint_every": 9}, "save_steps", 9),
    ],
)
def test_a_setting_reaches_the_trainer(
    setting: dict[str, Any], argument: str, value: Any, tmp_path: Path
) -> None:
    assert trainer_arguments(job(tmp_path, global_batch=4, **setting), passes=1)[argument] == value


def test_the_settings_of_lora_reach_the_adapters() -> None:
    made = adapter_config(Lora(r=8, alpha=32, dropout=0.25, targets=["q_proj"]))
    assert (made.r, made.lora_alpha, made.lora_dropout) == (8, 32, 0.25)
    assert made.target_modules == {"q_proj"}


@pytest.mark.parametrize(("steps", "warmup", "slow"), [(1, 0.1, 0), (2, 0.9, 1), (10, 0.25, 3)])
def test_the_last_step_is_never_warmup(
    steps: int, warmup: float, slow: int, tmp_path: Path
) -> None:
    """The rate of the first step of warmup is 0; a training of that step alone learns nothing."""
    task = replace(job(tmp_path, global_batch=4, warmup=warmup), order=list(range(4 * steps)))
    assert trainer_arguments(task, passes=1)["warmup_steps"] == slow


def test_a_discarded_checkpoint_is_in_no_record(tmp_path: Path) -> None:
    """A record of a missing checkpoint would stop every later start."""
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
    for record in (RAY_RECORD, RECORD):
        (tmp_path / record).write_text("checkpoint-4")
    remove_checkpoints(tmp_path, keep="checkpoint-4")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", RAY_RECORD, RECORD}
    remove_checkpoints(tmp_path, keep=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "enabled"), [("bf16", True), ("fp32", False)])
def test_precision_is_deepspeeds_autocast(precision: str, enabled: bool, tmp_path: Path) -> None:
    arguments = trainer_arguments(job(tmp_path, precision=precision), passes=1)
    assert arguments["deepspeed"]["torch_autocast"] == {"enabled": enabled, "dtype": "bfloat16"}
    assert arguments["bf16"] is False  # the trainer's mixed precision would round the weights


@pytest.mark.parametrize(
    ("files", "zero", "workers"),
    [
        (["mp_rank_00_model"], 0, 1),
        (["mp_rank_00_model", *(f"zero_pp_rank_{n}_mp_rank_00_optim" for n in (0, 1))], 2, 2),
        ([f"zero_pp_rank_0_mp_rank_00_{part}" for part in ("model", "optim")], 3, 1),
    ],
)
def test_files_of_a_checkpoint_say_how_it_was_written(
    files: list[str], zero: int, workers: int, tmp_path: Path
) -> None:
    (tmp_path / "latest").write_text("global_step5")
    (tmp_path / "global_step5").mkdir()
    for name in files:
        (tmp_path / "global_step5" / f"{name}_states.pt").touch()
    assert written_by(tmp_path) == (zero, workers)


def test_a_worker_without_a_gpu_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", called.append)
    for name in ("keep_freed_memory", "let_deepspeed_run_on_cpu", "use_small_tiles"):
        monkeypatch.setattr(cpu, name, lambda name=name: called.append(name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cpu.prepare_worker(3)
    assert called == [3, "keep_freed_memory", "let_deepspeed_run_on_cpu", "use_small_tiles"]
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_other_zero_stage_is_refused() -> None:
    import deepspeed

    from zephyr_ray.train.reporter import refuse_other_engines

    engine = deepspeed.DeepSpeedEngine.__new__(deepspeed.DeepSpeedEngine)
    engine.zero_optimization_stage = lambda: 1
    with pytest.raises(Permanent, match="ZeRO stage 1, the recipe asks for 3"):
        refuse_other_engines(engine, 3)


@pytest.mark.parametrize(
    ("workers", "zero", "averages"), [(1, 0, False), (2, 0, True), (1, 1, True)]
)
def test_gradients_of_one_worker_are_not_averaged(
    workers: int, zero: int, averages: bool, tmp_path: Path
) -> None:
    import deepspeed

    from zephyr_ray.train.reporter import Reporter

    engine = deepspeed.DeepSpeedEngine.__new__(deepspeed.DeepSpeedEngine)
    engine.zero_optimization_stage = lambda: zero
    engine.enable_backward_allreduce = True
    trainer = SimpleNamespace(model_wrapped=engine)
    reporter = Reporter(job(tmp_path, zero=zero), trainer, context=None, rank=0)
    reporter.on_train_begin(SimpleNamespace(world_size=workers), None, None)
    assert engine.enable_backward_allreduce == averages


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training(loss: float, tmp_path: Path) -> None:
    from transformers import TrainerState

    from zephyr_ray.train.reporter import Reporter

    reporter = Reporter(job(tmp_path), trainer=None, context=None, rank=0)
    reporter.on_step_begin(None, None, None)
    with pytest.raises(Permanent, match=f"the loss is {loss} at step 3; lower learning_rate"):
        reporter.on_log(None, TrainerState(global_step=3), None, {"loss": loss})
    assert list(Journal(tmp_path / "scratch" / "steps").read_new()) == []


def test_a_weight_that_is_not_finite_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    state = {"sound": torch.ones(2), "broken": torch.tensor([1.0, math.nan])}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(get_state_dict=lambda model: state), model_wrapped=None
    )
    with pytest.raises(Permanent, match=r"1 weights .* \(the first: broken\); lower learning_rate"):
        save(SimpleNamespace(), trainer)  # the job has no folder to write to


def test_rank_0_writes_the_steps(tmp_path: Path) -> None:
    from transformers import TrainerState

    from zephyr_ray.train.reporter import Reporter

    for rank in (0, 1):
        reporter = Reporter(job(tmp_path, global_batch=4), trainer=None, context=None, rank=rank)
        reporter.on_step_begin(None, None, None)
        args = SimpleNamespace(world_size=2)
        reporter.on_log(args, TrainerState(global_step=3), None, {"loss": 0.5, "nll": 2.0})
    [step] = read_jsonl(tmp_path / "scratch" / "steps" / "rank0.jsonl")
    assert step.pop("seconds") >= 0
    assert step == {"step": 3, "steps": 10, "workers": 2, "loss": 0.5, "nll": 2.0}


def test_the_final_loss_is_the_mean_of_the_last_tenth_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train.torch

    work = train_once.work_for(tmp_path, tmp_path / "model", [])
    work.counts["rows"] = 40
    # Step 20 twice, as after a resume: its last loss counts.
    losses = [(20, 90.0), *((step, 21.0 - step) for step in range(1, 21))]

    def fit() -> None:
        for step, loss in losses:
            work.journal("steps", "rank0").append({"step": step, "steps": 20, "loss": loss})

    monkeypatch.setattr(workers, "connect", lambda: None)
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    workers.train(work, job(work.folder, global_batch=2))
    assert work.counts["steps"] == 20
    assert work.counts["train/loss_final"] == 1.5  # steps 19 and 20: (2 + 1) / 2


def test_saved_model_ends_and_pads_as_it_was_trained(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = "{{ messages }}"
    model = load_model(str(tiny_model))
    model.config.use_cache = False
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = None
    write_model(model, ChatFormat.of(tokenizer).prepare(), tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.eos_token, saved.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert saved.chat_template == CHATML
    assert AutoConfig.from_pretrained(tmp_path).use_cache
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / name).read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)


def test_qlora_loads_its_start_weights_in_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import torch

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Permanent, match="lora.quantized needs the package bitsandbytes"):
        four_bits()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    settings = four_bits()
    config = settings["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert settings["device_map"] == {"": 3}
