"""Tests our trainer without Ray and DeepSpeed; its losses and metrics equal TRL's."""

from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.model import load_model, use_segments
from zephyr_ray.train.settings import Lora
from zephyr_ray.train.sft import Sft

DIALOGUES = [
    {"input_ids": [5, 6, 7, 8, 9, 2], "labels": [-100, -100, 7, 8, 9, 2], "seq_lengths": [6]},
    {"input_ids": [5, 9, 2, 4, 7, 2], "labels": [-100, 9, 2, -100, 7, 2], "seq_lengths": [3, 3]},
]
UNPACKED = [
    {"input_ids": [5, 6, 7, 8, 9, 2], "labels": [-100, -100, 7, 8, 9, 2]},
    {"input_ids": [5, 9, 2], "labels": [-100, 9, 2]},
]
PAIRS = [
    {
        "prompt_ids": [5, 6, 7],
        "chosen_ids": [8, 9, 10, 2],
        "rejected_ids": [11, 2],
        "ref_chosen_logps": -20.0,
        "ref_rejected_logps": -10.0,
    },
    {
        "prompt_ids": [5, 6],
        "chosen_ids": [8, 2],
        "rejected_ids": [12, 13, 14],
        "ref_chosen_logps": -11.0,
        "ref_rejected_logps": -21.0,
    },
]
LORA = {"r": 4, "targets": ["q_proj"], "dropout": 0.3}


@pytest.fixture(params=["dense", "experts"])
def start(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    """Returns a function that makes the start model: a Llama, or a mixture of experts."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    def experts() -> Any:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            router_aux_loss_coef=0.5,
        )
        model = MixtralForCausalLM(config)
        use_segments(model)
        return model

    return experts if request.param == "experts" else lambda: load_model(str(tiny_model))


@pytest.fixture
def common(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns the arguments that both trainers get."""
    import trl.trainer.utils
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)
    args = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    return {"args": args, "tokenizer": AutoTokenizer.from_pretrained(tiny_model)}


def plain(model: Any) -> Any:
    """Returns the model with transformers' own attention."""
    model.set_attn_implementation("sdpa")
    return model


def our_trainer(stage: Any, start: Any, common: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    from zephyr_ray.train.trainer import Trainer
    from zephyr_ray.train.worker import adapter_config

    return Trainer(
        stage.objective(),
        ["trl"],
        data=rows,
        steps=[],
        global_batch=len(rows),
        model=start(),
        peft_config=adapter_config(stage.lora),
        **common,
    )


def step(trainer: Any, rows: list[dict[str, Any]], terms: Any, passes: int = 1) -> dict[str, float]:
    """Returns the loss and metrics of one of a step's forward passes. `terms` counts the terms of
    the step's loss; None if TRL averages over the pass."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = passes
    batch = trainer.data_collator(rows)
    if hasattr(trainer, "objective"):
        batch["weight"] = 1 / passes
        terms = len(rows) if terms is None else terms
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=terms)
    logs = {"loss": loss.item()}
    trainer.log(logs)
    logs.pop("real_token_share", None)  # TRL has no such metric
    return logs


@pytest.mark.parametrize("packing", [True, False])
def test_sft_equals_trls(packing: bool, start: Any, common: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    rows = DIALOGUES if packing else UNPACKED
    ours = our_trainer(Sft(model="base", data="data", packing=packing), start, common, rows)
    common["args"].padding_free = packing
    theirs = SFTTrainer(
        plain(start()),
        common["args"],
        train_dataset=Dataset.from_list(rows),
        processing_class=common["tokenizer"],
    )
    tokens = torch.tensor(19)  # loss terms in both passes of the step
    assert step(ours, rows, tokens, 2) == pytest.approx(step(theirs, rows, tokens, 2), abs=1e-5)


def test_dpo_equals_trls(start: Any, common: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Theirs(DPOTrainer):
        """Reads rows that are tokenized and have reference log-probabilities."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        _precompute_ref_logps = _prepare_dataset

    ours = our_trainer(Dpo(model="base", data="data", beta=0.3), start, common, PAIRS)
    args = DPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.3,
        precompute_ref_log_probs=True,
    )
    theirs = Theirs(
        plain(start()),
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=common["tokenizer"],
    )
    assert step(ours, PAIRS, None) == pytest.approx(step(theirs, PAIRS, None), abs=1e-5)


@pytest.mark.parametrize("start", ["dense"], indirect=True)
def test_metrics_of_a_step_are_gathered_once(
    start: Any, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = our_trainer(Dpo(model="base", data="data"), start, common, PAIRS)
    gathered: list[Any] = []
    gather = trainer.accelerator.gather
    monkeypatch.setattr(
        trainer.accelerator, "gather", lambda values: (gathered.append(values), gather(values))[1]
    )
    alone = [step(trainer, [pair], None) for pair in PAIRS]
    assert len(gathered) == 2
    for pair in PAIRS:
        batch = trainer.data_collator([pair]) | {"weight": 0.5}
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=2)
    both: dict[str, float] = {}
    trainer.log(both)
    assert len(gathered) == 3
    assert both["num_tokens"] == 2 * alone[-1]["num_tokens"]
    # Means over all terms: over the pairs, or over their 6 and 5 trained tokens.
    for name, terms in (("entropy", (6, 5)), ("logps/chosen", (1, 1)), ("rewards/margins", (1, 1))):
        total = sum(n * logs[name] for n, logs in zip(terms, alone, strict=True))
        assert both[name] == pytest.approx(total / sum(terms))


@pytest.mark.parametrize(("stage", "rows", "p"), [(Sft, DIALOGUES, 0.3), (Dpo, PAIRS, 0)])
@pytest.mark.parametrize("start", ["dense"], indirect=True)
def test_dropout_is_off_in_dpo(
    stage: Any, rows: list[dict[str, Any]], p: float, start: Any, common: dict[str, Any]
) -> None:
    from torch.nn import Dropout

    trainer = our_trainer(stage(model="base", data="data", lora=LORA), start, common, rows)
    modules = [module for module in trainer.model.modules() if isinstance(module, Dropout)]
    assert modules and {module.p for module in modules} == {p}


@pytest.mark.parametrize("lora", [None, Lora(**LORA)])
def test_norms_are_rounded_once_under_autocast(lora: Lora | None, tiny_model: Path) -> None:
    import torch

    model, dtypes = load_model(str(tiny_model), adapted=lora is not None), []
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids).logits
    kept = torch.float32 if lora else torch.bfloat16
    assert dtypes == [torch.float32] * 2 + [kept] * 2
    for norm in [norm for layer in model.model.layers for norm in layer.children()]:
        norm._forward_hooks.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded, model(ids).logits)


@pytest.mark.parametrize(
    ("stage", "rows", "terms", "tokens"), [(Sft, DIALOGUES, 8, 12), (Dpo, PAIRS, 2, 21)]
)
@pytest.mark.parametrize("start", ["dense"], indirect=True)
def test_an_empty_micro_batch_trains_nothing(
    stage: Any,
    rows: list[dict[str, Any]],
    terms: int,
    tokens: int,
    start: Any,
    common: dict[str, Any],
) -> None:
    from zephyr_ray.train.batches import MicroBatch
    from zephyr_ray.train.trainer import Batches

    trainer = our_trainer(stage(model="base", data="data"), start, common, rows)
    trainer.model.train()
    parts = [MicroBatch([1, 0], 1.0), MicroBatch([], 0)]
    full, empty = Batches(rows, parts, trainer.data_collator)
    assert int(trainer._get_num_items_in_batch([full, empty], "cpu")) == terms
    loss = trainer.compute_loss(trainer.model, empty, num_items_in_batch=terms)
    loss.backward()
    assert loss.item() == 0
    assert not any(w.grad.any() for w in trainer.model.parameters() if w.grad is not None)
    assert trainer.compute_loss(trainer.model, full, num_items_in_batch=terms).item() > 0
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["num_tokens"] == tokens


@pytest.mark.parametrize("start", ["dense"], indirect=True)
def test_the_share_of_real_tokens_is_logged_if_batches_are_padded(
    start: Any, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from zephyr_ray.train import objectives

    monkeypatch.setattr(objectives, "FAMILIES", ())
    trainer = our_trainer(Sft(model="base", data="data", packing=False), start, common, UNPACKED)
    trainer.model.train()
    for rows in (UNPACKED, UNPACKED[:1]):
        batch = trainer.data_collator(rows) | {"weight": 0.5}
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=10)
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["real_token_share"] == pytest.approx((6 + 3 + 6) / (6 + 6 + 6))
