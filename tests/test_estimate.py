"""Tests the estimate against what PyTorch, PEFT and DeepSpeed allocate, and hand calculations."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import zero_memory
from ports import free_port

from zephyr_ray.demand import Calls
from zephyr_ray.engines.ledger import Ledger
from zephyr_ray.engines.tariff import Usage
from zephyr_ray.errors import Permanent
from zephyr_ray.estimate import forward, training
from zephyr_ray.estimate.printing import estimate_lines
from zephyr_ray.models import shapes
from zephyr_ray.models.shapes import Shape, find_shape, shape_of
from zephyr_ray.pipeline import KINDS, main
from zephyr_ray.plan import make_plan
from zephyr_ray.preflight import check_settings, preflight
from zephyr_ray.recipe import Hardware, load
from zephyr_ray.store import Store
from zephyr_ray.text.prompts import SelfInstruct
from zephyr_ray.train import memory
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.reference_stage import Reference
from zephyr_ray.train.sft import Sft

MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
}
SMALL = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
GIB = 2**30
NOTHING_FITS = "no setting makes it fit; use a GPU with more memory"


def sft(**settings: Any) -> Sft:
    return Sft(model="m", data="d", **settings)


def build(config: dict[str, Any], meta: bool = False) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta" if meta else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, use_cache=False))


def test_mistral_7b_has_its_published_number_of_parameters() -> None:
    shape = shape_of(MISTRAL_7B)
    assert shape.parameters == 7_241_732_096
    assert shape.linear_parameters == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert find_shape("mistralai/Mistral-7B-v0.1") == shape_of(
        MISTRAL_7B | {"max_position_embeddings": 32768}
    )


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL | {"tie_word_embeddings": True, "head_dim": 64},
        SMALL | {"model_type": "mistral"},
        SMALL | {"model_type": "qwen2"},
        SMALL | {"model_type": "qwen3", "head_dim": 32},
    ],
)
def test_parameters_are_those_of_the_built_model(config: dict[str, Any]) -> None:
    model = build(config, meta=True)
    assert shape_of(config).parameters == sum(p.numel() for p in model.parameters())
    built = shapes._built_shape(config)
    assert (built.parameters, built.linear_parameters) == (
        shape_of(config).parameters,
        shape_of(config).linear_parameters,
    )


def test_another_architecture_is_counted_from_the_built_model() -> None:
    config = {"model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 100}
    shape = shape_of(config)
    assert shape.parameters == sum(p.numel() for p in build(config, meta=True).parameters())
    assert shape.linear_parameters == 2 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 256)


def test_adapters_are_those_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    for targets in (None, ["q_proj", "mlp.up_proj"]):
        config = LoraConfig(r=5, target_modules=targets or "all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(build(SMALL), config)
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert shape_of(SMALL).adapter_parameters(5, targets) == expected
    # The handbook's adapters: 41.9 M at rank 16, by hand.
    layer = 16 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert shape_of(MISTRAL_7B).adapter_parameters(16, None) == 32 * layer == 41_943_040


def test_kv_cache_is_that_of_transformers() -> None:
    import torch
    from transformers import DynamicCache

    model, cache = build(SMALL).bfloat16(), DynamicCache()
    with torch.no_grad():
        model(torch.arange(77)[None], past_key_values=cache, use_cache=True)
    real = sum(t.untyped_storage().nbytes() for a in cache.layers for t in (a.keys, a.values))
    assert shape_of(SMALL).kv_bytes(77) == real
    # 128 KiB per token of Mistral-7B: 32 layers, keys and values of 8 heads of 128, in bf16.
    assert shape_of(MISTRAL_7B).kv_bytes(1) == 32 * 2 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"precision": "bf16"}, 512),
        ({"precision": "bf16", "gradient_checkpointing": True}, 256),
        ({"precision": "bf16", "gradient_checkpointing": True}, 1024),
        ({"precision": "fp32"}, 512),
        ({"precision": "bf16", "lora": {"r": 4, "dropout": 0}}, 512),
        (
            {"precision": "bf16", "lora": {"r": 4, "dropout": 0}, "gradient_checkpointing": True},
            2048,
        ),
    ],
)
def test_activations_are_what_pytorch_allocates(settings: dict[str, Any], tokens: int) -> None:
    """Measures what the allocator records for a small Llama on a CPU, without the output layer,
    whose GPU kernel differs."""
    import torch

    torch.set_num_threads(1)
    from zephyr_ray.train.kernels import round_norms

    stage, model = sft(zero=0, workers=1, **settings), build(SMALL)
    if not stage.lora:
        round_norms(model)
    if stage.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=4, lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        model.enable_input_require_grads()
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.get_base_model().model if stage.lora else model.model
    for parameter in model.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.arange(tokens)[None] % 1000

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.precision == "bf16"):
            loss = layers(ids).last_hidden_state.mean()
        loss.backward()

    step()
    real = zero_memory.peak_bytes(step)
    assert memory.activations(stage, shape_of(SMALL), tokens) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(("precision", "tokens"), [("bf16", 256), ("bf16", 2048), ("fp32", 1024)])
def test_a_forward_pass_is_what_pytorch_allocates(precision: str, tokens: int) -> None:
    """Without the output layer, which needs less here."""
    import torch

    torch.set_num_threads(1)
    from zephyr_ray.train.kernels import round_norms

    model, shape = build(SMALL), shape_of(SMALL)
    round_norms(model)
    model.requires_grad_(False)
    settings = {"zero": 0, "precision": precision, "micro_batch": tokens}
    stage = Reference(model="m", data="d", gpus_per_worker=1, **settings)
    ids = torch.arange(tokens)[None] % 1000

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model.model(ids, use_cache=False)

    step()
    needed = memory.forward_memory(stage, shape)
    assert needed.activations == pytest.approx(zero_memory.peak_bytes(step), rel=0.1)
    assert needed.weights == 4 * shape.parameters


def test_output_layer_on_a_cpu_is_what_pytorch_allocates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL's fused output layer, forward and backward, over two by four tiles."""
    import torch
    import trl.kernels.chunked_logprob
    import trl.trainer.utils
    from trl.trainer.utils import add_fused_lm_head

    from zephyr_ray.train.cpu import use_small_tiles

    for module, name in (
        (trl.kernels.chunked_logprob, "TOKEN_CHUNK_SIZE"),
        (trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    use_small_tiles()
    tokens, config = 2048, SMALL | {"vocab_size": 16_384, "num_hidden_layers": 1}
    model, shape = build(config), shape_of(config)
    add_fused_lm_head(model)
    hidden = torch.randn(1, tokens + 1, shape.hidden).requires_grad_()
    output = type("Output", (), {"last_hidden_state": hidden})
    model.base_model.forward = lambda *_, **__: output
    labels = torch.arange(tokens + 1)[None]
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(labels, labels=labels, fused_lm_head=True)
        out.log_probs.mean().backward()

    step()
    real = zero_memory.peak_bytes(step)
    expected = memory.output_layer(sft(), shape, tokens)
    assert expected == pytest.approx(real, rel=0.1)


def test_model_states_are_what_deepspeed_holds() -> None:
    """Runs two workers. On a CPU, offloaded state is in the same memory."""
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    stages = ["1:none", "2:none", "3:none", "3:optimizer"]
    program = [sys.executable, str(root / "tests" / "zero_memory.py"), f"{free_port()}", *stages]
    out = subprocess.run(program, env=env, capture_output=True, text=True, check=True).stdout
    shape = shape_of(zero_memory.MODEL)
    measurements = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(measurements) == len(stages)
    for real in measurements:
        stage = zero_memory.settings(real["zero"], real["offload"])
        states = memory.model_states(stage, shape, zero_memory.BUCKET)
        peak = sum(states) + memory._rounded_weights(stage, shape)
        assert peak == pytest.approx(real["peak"], rel=0.1), real


def test_checkpoints_of_adapters_leave_out_the_weights_under_them() -> None:
    start: Any = SimpleNamespace(shape=lambda: shape_of(SMALL))
    footprint = sft(lora={"r": 4, "targets": ["q_proj"]}).footprint({"m": start})
    # Two checkpoints of fp32 weights and optimizer state, 16 bytes per parameter: 6 layers with
    # adapters of rank 4 on 256 × 256.
    assert footprint.scratch == 2 * 16 * 6 * 4 * (256 + 256)
    assert sft().footprint({"m": start}).scratch == 2 * 16 * shape_of(SMALL).parameters


def test_adamw_on_one_worker_is_sixteen_bytes_per_parameter() -> None:
    import torch

    model = build(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    held = [t for p in model.parameters() for t in (p, p.grad)] + moments
    real = sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert sum(memory.model_states(sft(zero=0), shape_of(SMALL))) == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    # 7.24 × 10⁹ parameters on 8 GPUs, in GiB: per parameter 4 bytes of weights, 4 of gradients, 12
    # of optimizer state (8 if it is not partitioned and has no master weights).
    [
        (0, 26.98, 26.98, 53.95),
        (1, 26.98, 26.98, 10.12),
        (2, 26.98, 3.37, 10.12),
        (3, 3.37, 3.37, 10.12),
    ],
)
def test_states_of_7b_by_hand(
    zero: int, weights: float, gradients: float, optimizer: float
) -> None:
    states = memory.model_states(sft(zero=zero, workers=8), shape_of(MISTRAL_7B))
    assert [part / GIB for part in states[:3]] == pytest.approx(
        [weights, gradients, optimizer], abs=0.01
    )


def test_offloaded_and_quantized_states_of_7b_by_hand() -> None:
    shape = shape_of(MISTRAL_7B)
    offloaded = memory.model_states(sft(zero=3, workers=8, offload="all"), shape)
    assert offloaded[:3] == (0, 0, 0) and offloaded[4] == pytest.approx(24 * shape.parameters / 8)
    qlora = sft(zero=2, workers=8, lora={"quantized": True})
    # 6.98 × 10⁹ in 4.5 bits; embeddings, output layer and norms in fp32; adapters in fp32.
    expected = (
        0.5625 * shape.linear_parameters
        + 4 * (shape.parameters - shape.linear_parameters)
        + 4 * 41_943_040
    )
    assert memory.model_states(qlora, shape)[0] == expected


def test_weights_in_four_bits_are_what_bitsandbytes_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="only recipes with lora.quantized need it")
    import torch
    from transformers import AutoModelForCausalLM

    from zephyr_ray.train.model import four_bits

    build(SMALL).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **four_bits())
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    held = [*model.parameters(), *(state.absmax for state in states if state)]
    real = sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert memory.start_weights(sft(lora={"quantized": True}), shape_of(SMALL)) == real


def test_weights_in_four_bits_are_half_a_byte_and_a_scale_for_each_block_of_64() -> None:
    """The expected bytes follow from the format of bitsandbytes and the model's layers."""
    import torch

    model = build(SMALL, meta=True)
    linear = [
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    ]
    others = sum(p.numel() for p in model.parameters()) - sum(linear)
    held = sum(n // 2 + 4 * (n // 64) for n in linear) + 4 * others
    assert memory.start_weights(sft(lora={"quantized": True}), shape_of(SMALL)) == held


def test_four_bits_are_nf4_with_scales_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from zephyr_ray.train import model

    monkeypatch.setattr(model, "need_bitsandbytes", lambda what: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    config = model.four_bits()["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert not config.bnb_4bit_use_double_quant  # the scales would be in 8 bits


def planned(stage: Any, gib: float = 80, **more: Any) -> training.TrainingEstimate:
    hardware = Hardware(gpu_memory_gib=gib, **more)
    return training.estimate(stage, shape_of(MISTRAL_7B), hardware, 207_865, 1371.08, None)


LORA = {"lora": {"r": 16}}
FULL = {"gpus_per_worker": 1, "gradient_checkpointing": True, "global_batch": 128}


def test_ultrachat_packs_into_the_published_tokens_and_sequences() -> None:
    estimate = planned(sft(**FULL, workers=8, micro_batch=8192), tflops=276)
    assert estimate.sequences == pytest.approx(139_000, rel=0.01)
    assert estimate.tokens == pytest.approx(285e6, rel=0.01)
    assert estimate.steps == 1088 and estimate.fits and not estimate.upper_bound
    # Published: 5,614 s on 8 GPUs.
    assert estimate.hours == pytest.approx(5614 / 3600, rel=0.02)


def test_a_stated_rate_gives_the_hours() -> None:
    stage = sft(**FULL, workers=8)
    estimate = training.estimate(stage, shape_of(MISTRAL_7B), None, 207_865, 1371.08, 24.83)
    assert estimate.hours == pytest.approx(5614 / 3600, rel=0.01)
    assert estimate.fits is None and estimate.largest_micro_batch is None


@pytest.mark.parametrize(
    ("settings", "gib", "advice"),
    [
        ({"workers": 8, "zero": 2}, 80, ""),
        ({"workers": 8, "zero": 2, "micro_batch": 2048}, 48, "zero: 3 makes it fit"),
        (
            {"workers": 8, "gradient_checkpointing": False, "micro_batch": 16384},
            80,
            "gradient_checkp",
        ),
        ({"workers": 8, "micro_batch": 32768}, 48, "micro_batch: 29440 makes it fit"),
        ({"workers": 1, "zero": 0}, 80, "offload: optimizer makes it fit"),
        ({"workers": 2, "zero": 3}, 48, "offload: optimizer makes it fit"),
        ({"workers": 1, "zero": 0}, 4, f"{NOTHING_FITS} or set lora: {{}}"),
        ({"workers": 1, "lora": {}}, 4, NOTHING_FITS),
    ],
)
def test_a_stage_that_does_not_fit_gets_advice(
    settings: dict[str, Any], gib: float, advice: str
) -> None:
    estimate = planned(sft(**FULL | {"micro_batch": 8192} | settings), gib)
    assert estimate.fits == (not advice)
    assert estimate.advice.find(advice) >= 0, estimate.advice
    if advice == NOTHING_FITS:
        assert estimate.advice == NOTHING_FITS
    if estimate.largest_micro_batch:
        largest = sft(**FULL | settings | {"micro_batch": estimate.largest_micro_batch})
        assert planned(largest, gib).fits


def test_70b_has_its_number_of_parameters() -> None:
    shape = find_shape("meta-llama/Llama-2-70b-hf")
    assert isinstance(shape, Shape) and shape.parameters == 68_976_648_192


@pytest.mark.parametrize(("loss", "reference"), [("sigmoid", 2), ("simpo", 0)])
def test_hours_of_lora_and_of_dpo_by_hand(loss: str, reference: int) -> None:
    full, lora = (planned(sft(**FULL, workers=8, **more), tflops=100) for more in ({}, LORA))
    assert full.hours and lora.hours
    assert full.hours / lora.hours == pytest.approx(6 / 4)
    batch = FULL | {"global_batch": 50}
    pairs = Dpo(model="m", data="d", **batch, epochs=2, max_length=1000, loss=loss)
    hardware = Hardware(gpu_memory_gib=80, tflops=100)
    estimate = training.estimate(pairs, shape_of(MISTRAL_7B), hardware, 1000, None, None)
    # Two epochs of 1000 pairs of 2 × 1000 tokens, 6 operations per token and parameter, and 2 for
    # the reference, once; SimPO has none.
    operations = (6 * 2 + reference) * 2_000_000 * 7_241_732_096
    assert estimate.hours == pytest.approx(operations / 100e12 / 3600)


def test_a_reference_takes_its_hours_from_dpo() -> None:
    shape, hardware = shape_of(MISTRAL_7B), Hardware(gpu_memory_gib=80, tflops=100)
    settings = {"model": "m", "data": "d", "gpus_per_worker": 1, "workers": 2, "max_length": 1000}
    dpo = Dpo(**settings, reference="r", epochs=2, global_batch=50)
    trained = training.estimate(dpo, shape, hardware, 1000, None, None)
    assert trained.hours == pytest.approx(6 * 2 * 2e6 * 7_241_732_096 / 200e12 / 3600)
    scored = forward.estimate(Reference(**settings), shape, hardware, 1000, None, None)
    assert scored.hours == pytest.approx(2 * 2e6 * 7_241_732_096 / 200e12 / 3600)
    assert (scored.tokens, scored.upper_bound, scored.fits) == (2e6, True, True)
    assert forward.estimate(Reference(**settings), shape, None, 1000, 500, 4).hours == 250 / 3600


@pytest.mark.parametrize(
    ("settings", "weights", "buffers", "host"),
    [
        ({"zero": 0}, 29.0, 0, 0),
        ({"zero": 3, "workers": 4}, 29.0 / 4, 6, 0),
        ({"zero": 3, "workers": 4, "offload": "all"}, 0, 6, 29.0 / 4),
        ({"zero": 0, "quantized": True}, 4.97, 0, 0),
    ],
)
def test_states_of_a_7b_reference_by_hand(
    settings: dict[str, Any], weights: float, buffers: float, host: float
) -> None:
    # If quantized, the 6.98 B parameters in linear layers take 4.5 bits each; the rest of the
    # 7.24 B take 32.
    stage = Reference(model="m", data="d", gpus_per_worker=1, **settings)
    needed = memory.forward_memory(stage, shape_of(MISTRAL_7B))
    parts = [needed.weights, needed.buffers, needed.host]
    assert [size / 1e9 for size in parts] == pytest.approx([weights, buffers, host], rel=2e-3)
    assert needed.gradients == needed.optimizer == 0


RECIPE = """\
hardware: {gpu_memory_gib: 24}
models:
  base: {weights: only-config, gpus: 1, context: 2000}
  gpt: {engine: openai, model: m, base_url: "http://127.0.0.1:1/v1", price: [2.0, 10.0]}
stages:
  prompts: {kind: prompts, seeds: seeds.jsonl}
  talks: {kind: self_refine, model: base, prompts: prompts, turns: 2, max_tokens: 100}
  sft: {kind: sft, model: base, data: talks, gpus_per_worker: 1, workers: 2, global_batch: 8}
  answers:
    {kind: completions, models: [base, sft], prompts: prompts, per_prompt: 4, max_tokens: 200}
  feedback: {kind: feedback, judge: gpt, completions: answers}
  of_base: {kind: completions, models: [base], prompts: prompts, max_tokens: 300}
  of_sft: {kind: completions, models: [sft], prompts: prompts, max_tokens: 300}
  winrate: {kind: pairwise, judge: gpt, baseline: of_base, answers: [of_sft]}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """Writes a recipe with 100 prompts, whose model is a folder with only a config.json."""
    (tmp_path / "only-config").mkdir()
    (tmp_path / "only-config" / "config.json").write_text(json.dumps(MISTRAL_7B))
    tasks = [json.dumps({"instruction": f"Name {n} colours."}) + "\n" for n in range(100)]
    (tmp_path / "seeds.jsonl").write_text("".join(tasks))
    text = RECIPE.replace("seeds.jsonl}", "seeds.jsonl, count: 100}")
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def planned_lines(recipe_file: Path, *overrides: str) -> list[str]:
    find_shape.cache_clear()
    recipe = load(recipe_file, KINDS, list(overrides))
    store = Store(recipe_file.parent / "runs")
    return estimate_lines(recipe, store, make_plan(recipe, store))


def test_calls_tokens_and_dollars_by_hand(recipe_file: Path) -> None:
    recipe = load(recipe_file, KINDS)
    rows = {s.name: s.rows or 0 for s in make_plan(recipe, Store(recipe_file.parent / "runs"))}

    def calls(name: str) -> list[Calls]:
        return list(recipe.stages[name].calls(rows, recipe.stages).values())

    [feedback] = calls("feedback")
    # 100 prompts × 4 answers. Tokens in: form 128, prompt 256, answer 200; out: 256. Dollars per
    # million tokens: 2 and 10.
    assert (feedback.calls, feedback.tokens_in) == (400, 400 * (128 + 256 + 200))
    assert recipe.models["gpt"].settings.dollars(feedback) == pytest.approx(
        400 * (584 * 2 + 256 * 10) / 1e6
    )
    [winrate] = calls("winrate")
    assert (winrate.calls, winrate.tokens_out) == (200, 200 * 128)  # both orders
    assert [c.calls for c in calls("answers")] == [200, 200]
    [talks] = calls("talks")
    assert (talks.calls, talks.tokens_out) == (300, 100 * 2 * 100)


@pytest.mark.parametrize(("count", "calls"), [(10, 4 * 24 * 2), (300, 4 * 100 * 2)])
def test_calls_of_self_instruct_are_bounded(count: int, calls: int) -> None:
    """Four rounds of max(24, count / 3) rows, each of two requests."""
    stage = SelfInstruct(model="gpt", seeds="seeds.jsonl", count=count)
    assert stage.calls({}, {})["gpt"] == Calls(calls, calls * 256, calls * 128)


def test_a_folder_with_only_a_config_is_enough_for_a_plan(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"storage={recipe_file.parent / 'runs'}"
    assert main([str(recipe_file), "--plan", "--set", storage]) == 0
    shown = capsys.readouterr().out
    assert "7,241,732,096 parameters" in shown
    assert "does not fit 24 GiB: " in shown and "KV cache 0.24 GiB per conversation" in shown
    assert "all endpoints: ≤ 600 calls, about $2.14" in shown
    assert shown.index("pairwise") < shown.index("7,241,732,096")


@pytest.mark.parametrize(
    ("gigabytes", "micro_batch", "line"),
    [
        (
            600,
            8192,
            "fits 279 GiB of free memory per worker; micro_batch 8192; even a worker's full share "
            "of the global batch (8192 tokens) fits",
        ),
        (
            240,
            8192,
            "does not fit 111 GiB of free memory per worker: lower micro_batch to 5120, workers or",
        ),
        (
            240,
            4096,
            "fits 111 GiB of free memory per worker; micro_batch 4096; up to 5120 tokens fit",
        ),
    ],
)
def test_training_without_a_gpu_is_planned_for_the_free_memory(
    gigabytes: float,
    micro_batch: int,
    line: str,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = SimpleNamespace(available=gigabytes * 1e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    settings = ("sft.gpus_per_worker=0", f"sft.micro_batch={micro_batch}")
    assert line in "\n".join(planned_lines(recipe_file, *settings))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster has its own memory
    assert "of free memory" not in "\n".join(planned_lines(recipe_file, *settings))


def test_an_engine_that_does_not_fit_says_so(recipe_file: Path) -> None:
    text = "\n".join(planned_lines(recipe_file, "hardware.gpu_memory_gib=16"))
    assert "does not fit 16 GiB: weights 13.5 GiB" in text
    assert "fits 24 GiB: weights 13.5 GiB" in "\n".join(planned_lines(recipe_file))


def test_a_missing_price_and_a_missing_config_are_printed(recipe_file: Path) -> None:
    text = "\n".join(
        planned_lines(recipe_file, "models.gpt.price=null", "models.base.weights=nobody/none")
    )
    assert "feedback: gpt, ≤ 400 calls" in text and "without gpt (set price:)" in text
    assert "sft: no estimate: the config.json of nobody/none is missing here and on the hub" in text


def test_a_budget_is_printed_with_what_was_spent(recipe_file: Path) -> None:
    ledger = Ledger(recipe_file.parent / "runs" / "spending" / "recipe", "run")
    ledger.settle(ledger.reserve("s", "gpt", 9.0), Usage(1, 1), 1.25)
    assert planned_lines(recipe_file, "budget_usd=20")[-1] == (
        "budget: $20.00, of which $1.25 are spent"
    )
    assert planned_lines(recipe_file, "budget_usd=3.3")[-1] == (
        "budget: $3.30, of which $1.25 are spent; the estimate exceeds the remaining budget"
    )


@pytest.mark.parametrize(
    "command", [preflight, lambda recipe, _, steps: check_settings(recipe, steps)]
)
def test_a_budget_needs_prices(command: Any, recipe_file: Path) -> None:
    recipe = load(recipe_file, KINDS, ["budget_usd=20", "models.gpt.price=null"])
    store = Store(recipe.storage)
    says = (
        "model 'gpt' has no price, so budget_usd cannot be enforced; set models.gpt.price "
        r"to its dollars per million tokens, as \[input, output\]"
    )
    with pytest.raises(Permanent, match=says):
        command(recipe, store, make_plan(recipe, store))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "unknown"},
        {"model_type": "t5", "vocab_size": 100},
        MISTRAL_7B | {"num_attention_heads": 0},
        MISTRAL_7B | {"num_local_experts": 8},
    ],
)
def test_an_unsupported_config_is_one_line(recipe_file: Path, config: dict[str, Any]) -> None:
    folder = recipe_file.parent / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    text = "\n".join(planned_lines(recipe_file, f"models.base.weights={folder}"))
    assert "sft: no estimate: the config.json of" in text and "mixture of experts" in text


def test_hours_of_an_earlier_run_are_measured(recipe_file: Path) -> None:
    store = Store(recipe_file.parent / "runs")
    store.prepare()
    place = store.folder("sft", "0123456789abcdef")
    place.mkdir()
    counts = {"rows": 100, "sequences": 50}
    manifest = {"recipe": "recipe", "name": "sft", "seconds": 250.0, "counts": counts}
    manifest |= {"created": "2026-01-02T03:04:05", "settings": {"epochs": 2}}
    store.commit("sft", "0123456789abcdef", **manifest)
    # 50 sequences in each of 2 epochs in 250 s; at most 100 sequences are still to do.
    assert any(
        "4 min (at 0.4 sequences per second, as measured 2026-01-02)" in line
        for line in planned_lines(recipe_file)
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("hardware={gpus: 8}", "hardware: unknown setting 'gpus'"),
        ("hardware={gpu_memory_gib: 0}", "hardware: setting 'gpu_memory_gib'"),
        ("hardware={gpu_memory_gib: 80, rows_per_second: {stf: 2}}", "no stage 'stf'"),
        ("models.gpt.price=[1]", "model 'gpt': setting 'price'"),
        ("models.gpt.price=[1, 2, 3, 4]", "model 'gpt': setting 'price'"),
        ("models.gpt.price=[1, -2]", "model 'gpt': setting 'price.1'"),
        ("budget_usd=-1", "budget_usd is -1; it must be a number of dollars"),
    ],
)
def test_wrong_hardware_price_or_budget_is_one_line(
    override: str, says: str, recipe_file: Path
) -> None:
    with pytest.raises(Permanent, match=says):
        load(recipe_file, KINDS, [override])
