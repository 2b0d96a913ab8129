"""Training on real Ray Train workers with a real DeepSpeed engine, on a tiny random model."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import train_once

from zephyr_ray.errors import Permanent
from zephyr_ray.stage import Work
from zephyr_ray.store import read_jsonl
from zephyr_ray.train.dpo import answer
from zephyr_ray.train.sft import IGNORED, Sft, classes
from zephyr_ray.train.worker import Job, _fits, load_chat, load_model, refuse_other_engines
from zephyr_ray.train.workers import train

STEPS = 24
"""48 dialogues × 2 epochs / 4."""

Runner = Callable[..., Work]


@pytest.fixture(scope="module")
def sft(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return lambda **settings: train_once.sft(tmp_path_factory.mktemp("sft"), tiny_model, **settings)


@pytest.fixture(scope="module")
def one_worker(sft: Runner) -> Work:
    return sft(workers=1, micro_batch=4, zero=0)


@pytest.fixture(scope="module")
def zero_2(sft: Runner) -> Work:
    """Two workers, two forward passes a step each."""
    return sft(workers=2, micro_batch=1, zero=2)


@pytest.fixture(scope="module")
def zero_3(sft: Runner) -> Work:
    return sft(workers=2, micro_batch=2, zero=3)


@pytest.fixture(scope="module")
def dpo(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return train_once.dpo(
        tmp_path_factory.mktemp("dpo"),
        tiny_model,
        workers=2,
        micro_batch=2,
        zero=2,
        global_batch=4,
        epochs=3.5,
        learning_rate=2e-4,
        max_length=128,
        precision="fp32",
    )


def losses(work: Work) -> list[float]:
    return [row["loss"] for row in read_jsonl(work.folder / "metrics.jsonl")]


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model(torch.arange(3, 60)[None]).logits


def log_probs(model: Any, ids: list[int], labels: list[int]) -> Any:
    """Log-probability of every trained token of one row, by plain transformers."""
    import torch

    found = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = torch.tensor(labels[1:])
    return found[wanted != IGNORED, wanted[wanted != IGNORED]]


@pytest.fixture(scope="module")
def by_hand(one_worker: Work, tiny_model: Path) -> tuple[list[float], Any]:
    """The same training in plain PyTorch: losses, and logits of the trained model."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    settings = Sft(model="base", data="data", **train_once.SFT)
    rows = load_from_disk(str(one_worker.scratch / "data"))
    order = settings.order([len(ids) for ids in rows["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * STEPS), STEPS)
    found = []
    for step in range(STEPS):
        batch = [rows[row] for row in order[step * 4 : step * 4 + 4]]
        loss = -torch.cat([log_probs(model, r["input_ids"], r["labels"]) for r in batch]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    with torch.no_grad():
        return found, model(torch.arange(3, 60)[None]).logits


def test_training_is_what_plain_pytorch_does(
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
    found = losses(one_worker)
    assert len(found) == STEPS and found[-1] < found[0] - 1


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
    tail = losses(one_worker)[-2:]
    assert counts["train/loss_final"] == pytest.approx(sum(tail) / 2)
    assert "<|im_end|>" not in (one_worker.folder / "mask.html").read_text()
    assert "&lt;|im_end|&gt;" in (one_worker.folder / "mask.html").read_text()
    assert one_worker.progress.done == one_worker.progress.total == STEPS


def test_killed_driver_goes_on_from_a_checkpoint(
    zero_3: Work, tiny_model: Path, tmp_path: Path
) -> None:
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "RAY_AUTH_MODE": "disabled"}
    program = [sys.executable, str(Path(train_once.__file__)), str(tmp_path), str(tiny_model)]
    scratch = tmp_path / "made" / "scratch"
    state = scratch / "checkpoints" / "checkpoint_manager_snapshot.json"
    first = subprocess.Popen(program, env=env, cwd=tmp_path)
    while first.poll() is None and "checkpoint-" not in (
        state.read_text() if state.exists() else ""
    ):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    raw = scratch / "steps" / "rank0.jsonl"
    time.sleep(2)  # Ray's own processes end after their driver
    before = max(row["step"] for row in read_jsonl(raw))
    assert 5 <= before < STEPS, "the kill came too late to prove anything"
    (scratch / "checkpoints" / "checkpoint-999").mkdir()  # half written, never reported
    subprocess.run(program, env=env, cwd=tmp_path, check=True)
    steps = [row["step"] for row in read_jsonl(raw)]
    assert steps.count(1) == 1 and set(steps) == set(range(1, STEPS + 1))
    found = [row["loss"] for row in read_jsonl(tmp_path / "made" / "metrics.jsonl")]
    assert found == pytest.approx(losses(zero_3), abs=1e-5)


@pytest.mark.parametrize(
    ("files", "fits"),
    [
        (["mp_rank_00_model"], {(0, 1), (0, 2)}),
        (["mp_rank_00_model", *(f"zero_pp_rank_{n}_mp_rank_00_optim" for n in (0, 1))], {(2, 2)}),
        ([f"zero_pp_rank_0_mp_rank_00_{what}" for what in ("model", "optim")], {(3, 1)}),
    ],
)
def test_a_checkpoint_is_read_only_as_it_was_written(
    files: list[str], fits: set[tuple[int, int]], tmp_path: Path
) -> None:
    (tmp_path / "global_step5").mkdir()
    for name in files:
        (tmp_path / "global_step5" / f"{name}_states.pt").touch()
    layouts = [(zero, workers) for zero in (0, 2, 3) for workers in (1, 2)]
    assert {layout for layout in layouts if _fits(tmp_path, *layout)} == fits


def test_adapter_is_merged_into_the_saved_model(sft: Runner, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj"]}
    work = sft(workers=2, micro_batch=2, zero=3, epochs=0.5, lora=lora)
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
    found = {row["row"]: row for row in dpo.journal("reference").new()}
    for number, pair in enumerate(train_once.pairs(12)):
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(pair[side], return_dict=False)[:-1]  # no last \n
            ask = tokenizer.apply_chat_template(
                pair[side][:1], add_generation_prompt=True, return_dict=False
            )
            labels = [IGNORED] * len(ask) + ids[len(ask) :]
            with torch.no_grad():
                by_hand = log_probs(model, ids, labels).sum().item()
            assert found[number][side] == pytest.approx(by_hand, abs=1e-2)


def test_dpo_reports_rewards_and_separates_the_pairs(dpo: Work) -> None:
    last = list(read_jsonl(dpo.folder / "metrics.jsonl"))[-1]
    assert last["loss"] < math.log(2) and last["rewards/margins"] > 0
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= last.keys()


def test_rows_that_fill_the_last_step_are_counted(dpo: Work) -> None:
    # 3.5 × 12 pairs are 10.5 steps of 4.
    assert (dpo.counts["steps"], dpo.counts["repeated_to_fill_the_last_step"]) == (11, 2)


def test_packed_rows_do_not_see_each_other(tiny_model: Path) -> None:
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    chat = load_chat(str(tiny_model))
    rows = [chat.render(row["messages"])[0] for row in train_once.dialogues(3)]
    settings = Sft(model="base", data="data")
    model = load_model(Job(settings, str(tiny_model), Path(), [], classes, {}))
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": ids, "labels": ids} for ids in rows]
    )
    with torch.no_grad():
        # Without a cache, as in training: with one, transformers takes the row for a single text.
        places = batch["position_ids"]
        packed = model(batch["input_ids"], position_ids=places, use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in rows])
    assert (packed - alone).abs().max() < 1e-4


def test_ignored_deepspeed_configuration_is_refused(one_worker: Work, tiny_model: Path) -> None:
    settings = Sft(model="base", data="data", zero=2, **train_once.SFT)
    arguments = {"padding_free": True, "dataset_kwargs": {"skip_prepare_dataset": True}}
    ignored = {**arguments, "deepspeed": None}
    work = Work("plain", one_worker.folder.with_name("plain"), 0, {}, {}, {})
    work.scratch.mkdir(parents=True)
    (work.scratch / "data").symlink_to(one_worker.scratch / "data")
    job = Job(settings, str(tiny_model), work.folder, [0, 1, 2, 3], classes, ignored)
    with pytest.raises(Permanent, match="not on DeepSpeed"):
        train(work, job)


def test_other_zero_stage_is_refused() -> None:
    import deepspeed

    engine = deepspeed.DeepSpeedEngine.__new__(deepspeed.DeepSpeedEngine)
    engine.zero_optimization_stage = lambda: 1
    with pytest.raises(Permanent, match="ZeRO stage 1, the recipe asks for 3"):
        refuse_other_engines(engine, 3)


def test_global_batch_that_cannot_be_split_is_an_error() -> None:
    stage = Sft(model="base", data="data", global_batch=9, workers=2)
    with pytest.raises(Permanent, match="global_batch 9 .* 2 workers"):
        stage.batches()


@pytest.mark.parametrize(
    ("workers", "micro", "expected"),
    [(1, 4, (4, 3)), (2, 4, (3, 2)), (4, 4, (3, 1)), (3, 1, (1, 4))],
)
def test_micro_batch_and_accumulation_follow(
    workers: int, micro: int, expected: tuple[int, int]
) -> None:
    stage = Sft(model="base", data="data", global_batch=12, workers=workers, micro_batch=micro)
    assert stage.batches() == expected


def test_order_fills_whole_steps_and_shows_every_row() -> None:
    stage = Sft(model="base", data="data", global_batch=4, epochs=1, seed=3)
    lengths = [7, 3, 9, 1, 5, 2]
    order = stage.order(lengths)
    assert len(order) == 8 and set(order) == set(range(6))
    assert [lengths[row] for row in order[:4]] == sorted(
        (lengths[row] for row in order[:4]), reverse=True
    )


def test_the_end_of_an_answer_that_was_cut_off_is_not_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    chat = load_chat(str(tiny_model))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    rows = [{"id": "r", "messages": talk, "finish": ["length", "stop"]}]
    stage = Sft(model="base", data="data", packing=False)
    [row] = stage._tokens(train_once.work_for(tmp_path, tiny_model, rows), chat, rows)
    ends = [label for label in row["labels"] if label == chat.stop_token_id]
    assert row["input_ids"].count(chat.stop_token_id) == 4 and len(ends) == 1
    assert row["labels"].index(chat.stop_token_id) > len(row["labels"]) // 2


def test_an_answer_that_was_cut_off_has_no_end_in_dpo(tiny_model: Path) -> None:
    chat = load_chat(str(tiny_model))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    prompt, whole = answer(chat, talk, "stop")
    assert answer(chat, talk, "length") == (prompt, whole[:-1])
    assert whole[-1] == chat.stop_token_id


def test_truncation_is_counted_and_an_empty_row_dropped(tiny_model: Path, tmp_path: Path) -> None:
    long = {"role": "user", "content": "stone " * 60}
    answer = {"role": "assistant", "content": "old " * 60}
    rows = [
        {"id": "cut", "messages": [{"role": "user", "content": "a"}, answer]},
        {"id": "lost", "messages": [long, answer]},
    ]
    work = train_once.work_for(tmp_path, tiny_model, rows)
    stage = Sft(model="base", data="data", packing=False, max_length=32)
    assert stage._prepare(work, load_chat(str(tiny_model)), rows) == [32]
    assert work.counts["truncated"] == 2
    assert work.counts["dropped/truncated_to_nothing"] == 1
    assert work.examples["dropped/truncated_to_nothing"] == ["lost"]


def test_a_split_reference_scores_like_a_whole_one(
    dpo: Work, ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """With ZeRO-3, and optimiser and weights in the node's memory; 12 pairs, so that two workers
    with batches of 5 do not come out even."""
    settings = {"workers": 2, "zero": 3, "offload": "all", "micro_batch": 5, "global_batch": 10}
    split = train_once.dpo(
        tmp_path, tiny_model, **settings, epochs=1, max_length=128, precision="fp32"
    )
    found = {row["row"]: row for row in split.journal("reference").new()}
    whole = {row["row"]: row for row in dpo.journal("reference").new()}
    for side in ("chosen", "rejected"):
        expected = [whole[row][side] for row in range(12)]
        assert [found[row][side] for row in range(12)] == pytest.approx(expected, abs=1e-3)
    assert losses(split)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_offloaded_training_is_the_same(one_worker: Work, sft: Runner) -> None:
    offloaded = sft(workers=2, micro_batch=2, zero=2, offload="optimizer")
    assert losses(offloaded) == pytest.approx(losses(one_worker), abs=2e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora": {"quantized": True}, "zero": 2}, "lora.quantized needs a GPU: set gpus_per"),
        ({"optimizer": "paged_adamw_32bit"}, "optimizer: paged_adamw_32bit needs a GPU"),
        ({"lora": {"quantized": True}, "gpus_per_worker": 1}, "cannot be split; set zero: 2"),
        ({"offload": "optimizer", "zero": 0}, "offload: optimizer needs zero: 2, not zero: 0"),
        ({"offload": "all", "zero": 2}, "offload: all needs zero: 3, not zero: 2"),
    ],
)
def test_settings_that_cannot_go_together(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(Permanent, match=says):
        Sft(model="base", data="data", **settings).check({}, {})


def test_start_weights_of_qlora_are_asked_for_in_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import torch

    from zephyr_ray.train.bits import four_bits

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Permanent, match="lora.quantized needs the package bitsandbytes"):
        four_bits()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    settings = four_bits()
    config = settings["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert settings["device_map"] == {"": 3}
