"""Tests the planner's constants against the defaults of the installed libraries.

Parses the sources of the libraries, because importing them takes a minute.
"""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.workload import BILLION
from zephyr_ray.demand import GIB
from zephyr_ray.engines import vllm
from zephyr_ray.estimate import forward, training
from zephyr_ray.models.shapes import Shape, find_shape, shape_of
from zephyr_ray.recipe import Hardware
from zephyr_ray.train import memory
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.reference_stage import Reference
from zephyr_ray.train.sft import Sft


def mistral() -> Shape:
    """Returns Mistral's shape: 7,241,732,096 parameters, 32 layers of 4096, vocabulary 32,000."""
    shape = find_shape("mistralai/Mistral-7B-v0.1")
    assert shape
    return shape


def sft(**settings: Any) -> Sft:
    return Sft(model="m", data="d", **settings)


def on_one_gpu(kind: Any, **settings: Any) -> Any:
    return kind(model="m", data="d", gpus_per_worker=1, **{"zero": 0, **settings})


def default(module: str, name: str) -> Any:
    """Returns the literal that a module, or a class in it, assigns to a name: directly, or
    through a call, as in `x: int = Field(default=int(1), …)`."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], *parts).with_suffix(".py")
    [value] = [
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == name
    ]
    while isinstance(value, ast.Call):
        named = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
        value = (named or value.args)[0]
    assert value is not None
    return ast.literal_eval(value)


@pytest.mark.parametrize(
    ("assumed", "module", "name"),
    [
        (memory.LIVE, "deepspeed.runtime.zero.config", "max_live_parameters"),
        (memory.FLAT, "deepspeed.runtime.engine", "MEMORY_OPT_ALLREDUCE_SIZE"),
        (memory.TILE_TOKENS, "trl.kernels.chunked_logprob", "TOKEN_CHUNK_SIZE"),
        (memory.TILE_VOCABULARY, "trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE"),
        (vllm.GPU_SHARE, "vllm.config.cache", "gpu_memory_utilization"),
    ],
)
def test_constants_are_the_libraries_defaults(assumed: float, module: str, name: str) -> None:
    assert assumed == default(module, name)


def test_no_setting_of_ours_replaces_these_defaults() -> None:
    zero = sft(zero=3).deepspeed()["zero_optimization"]
    assert "stage3_max_live_parameters" not in zero
    assert "gpu_memory_utilization" not in vllm.engine_arguments(Path("m"), 512, 1, 0)


@pytest.mark.parametrize(
    ("settings", "gigabytes"),
    [
        ({"zero": 0, "workers": 1}, 0),
        ({"zero": 0, "workers": 2}, 4 * 0.5),  # one flat piece of gradients
        ({"zero": 2, "workers": 2}, 2 * 4 * 0.05),  # two buckets
        ({"zero": 3, "workers": 2}, 6 * 0.05 + 6 * 1.0),  # plus the gathered parameters
    ],
)
def test_buffers_by_hand(settings: dict[str, int], gigabytes: float) -> None:
    buffers = memory.model_states(sft(**settings), mistral())[3]
    assert buffers / 1e9 == pytest.approx(gigabytes)


@pytest.mark.parametrize(
    ("settings", "weights", "buffers"),
    [
        ({"zero": 0, "workers": {"least": 2, "most": 4}}, 1, 0),
        ({"zero": 3, "workers": {"least": 2, "most": 4}}, 1 / 2, 6 * 1.0),  # gathered parameters
        ({"zero": 3, "workers": 1}, 1, 0),
    ],
)
def test_forward_passes_split_weights_over_the_fewest_workers(
    settings: dict[str, Any], weights: float, buffers: float
) -> None:
    needed = memory.forward_memory(Reference(model="m", data="d", **settings), mistral())
    assert needed.weights == weights * 4 * mistral().parameters
    assert needed.buffers / 1e9 == pytest.approx(buffers)


def test_a_reference_that_does_not_fit_is_advised_to_split_its_weights() -> None:
    def advice(gib: float, **settings: Any) -> str:
        stage = Reference(model="m", data="d", gpus_per_worker=1, **settings)
        return forward.estimate(stage, mistral(), Hardware(gpu_memory_gib=gib), *[None] * 3).advice

    assert advice(24, zero=0, workers=8) == "zero: 3 makes it fit"
    assert advice(80, zero=0, workers=8) == ""
    # One worker has nothing to split, and 10 GiB cannot hold the gathered parameters.
    for gib, workers in ((24, 1), (10, 8)):
        assert advice(gib, zero=0, workers=workers).startswith("lower micro_batch")


@pytest.mark.parametrize(("tokens", "rows"), [(10_000, 4096), (100, 100)])
def test_a_tile_of_the_output_layer_by_hand(tokens: int, rows: int) -> None:
    shape = replace(mistral(), vocabulary=128_256)
    # bf16 logits of a tile, fp32 gradients of the matrix, and 8 bytes per token and channel.
    expected = 2 * rows * 32_768 + 4 * 128_256 * 4096 + 8 * tokens * 4096
    assert memory.output_layer(sft(gpus_per_worker=1), shape, tokens) == expected


def test_conversations_in_parallel_by_hand() -> None:
    settings = vllm.VllmSettings(weights="m", gpus=1, context=2000)
    # 24 GiB × 0.92, 2 GiB of reserve, 13.49 GiB of weights; 128 KiB per token of cache.
    room = int((24 * 0.92 - 2 - 2 * 7_241_732_096 / GIB) * GIB / (2000 * 2**17))
    assert room == 26
    assert settings.describe_memory(mistral(), 24).endswith(f"at most {room} in parallel")


@pytest.mark.parametrize(
    ("gib", "most"), [(26, None), (28, 3328), (30, 5888), (36, 13_568), (40, 18_944), (80, 32_768)]
)
def test_the_estimate_names_the_largest_micro_batch_that_fits(gib: float, most: int | None) -> None:
    # By hand, in GB: states 18.10, buffers 6.30, reserve 2.15, output layer 0.52; per token 819,200
    # bytes, and 64,000 more for each of the first 4,096: 0.26. So 30 GiB leave 4.87 for 5,953
    # tokens; in steps of 256, that is 5,888. 80 GiB hold a full step of one worker: 16 sequences.
    stage = sft(workers=8, gpus_per_worker=1, gradient_checkpointing=True, global_batch=128)

    def estimate_for(micro: int) -> training.TrainingEstimate:
        asked = stage.model_copy(update={"micro_batch": micro})
        hardware = Hardware(gpu_memory_gib=gib)
        return training.estimate(asked, mistral(), hardware, None, None, None)

    assert {estimate_for(micro).largest_micro_batch for micro in (2048, 4096, 99_999)} == {most}
    sizes = range(2048, 32_769, 256)
    assert max((tokens for tokens in sizes if estimate_for(tokens).fits), default=None) == most


def test_a_row_that_fits_is_a_micro_batch_whatever_its_length() -> None:
    stage = sft(workers=8, gpus_per_worker=1, gradient_checkpointing=True, max_length=2049)
    row = memory.worker_memory(stage.model_copy(update={"micro_batch": 2049}), mistral()).total
    # Each further token needs 699,000 bytes, so 2,304 tokens need 0.178 GB more than 2,049.
    sizes = [memory.largest_micro_batch(stage, mistral(), row + gb * 1e9) for gb in (-0.1, 0, 0.2)]
    assert sizes == [None, 2049, 2304]


LORA = {"r": 16, "dropout": 0.0}
ROW = 2048
"""Tokens of a packed sequence, or of a pair of two sequences of 1024."""


@pytest.mark.parametrize(
    ("gib", "stage", "family"),
    [
        (44.4, on_one_gpu(Sft, micro_batch=4 * ROW), ""),
        (29.4, on_one_gpu(Sft, micro_batch=1 * ROW), ""),
        (26.4, on_one_gpu(Sft, micro_batch=4 * ROW, gradient_checkpointing=True), ""),
        (26.7, on_one_gpu(Sft, micro_batch=4 * ROW, lora=LORA), ""),
        (45.7, on_one_gpu(Sft, micro_batch=4 * ROW, zero=3), ""),
        (63.0, on_one_gpu(Dpo, micro_batch=8 * ROW), ""),
        (36.9, on_one_gpu(Sft, micro_batch=4 * ROW), "llama"),
        (46.1, on_one_gpu(Sft, micro_batch=8 * ROW), "llama"),
        (30.3, on_one_gpu(Sft, micro_batch=4 * ROW, zero=3, gradient_checkpointing=True), "llama"),
        (26.7, on_one_gpu(Sft, micro_batch=4 * ROW, lora=LORA | {"quantized": True}), "llama"),
    ],
)
def test_planned_memory_is_what_a_gpu_showed(gib: float, stage: Any, family: str) -> None:
    # GiB in use on an H200 (benchmarks/RESULTS.md); an empty family means no Liger kernels.
    shape = replace(shape_of(BILLION.model | {"model_type": "llama"}), family=family)
    assert memory.worker_memory(stage, shape).total / GIB == pytest.approx(gib, rel=0.1)
