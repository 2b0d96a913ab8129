"""Tests the arguments of a vLLM engine on no GPU, a fraction of a GPU, one, and several."""

from pathlib import Path

import pytest

from zephyr_ray.engines.vllm import KV_CACHE_BYTES, VllmSettings, engine_arguments
from zephyr_ray.errors import Permanent
from zephyr_ray.pipeline import KINDS
from zephyr_ray.recipe import load

COMMON = {
    "model": "m",
    "dtype": "bfloat16",
    "max_model_len": 512,
    "seed": 7,
    "disable_log_stats": True,
}


@pytest.mark.parametrize(
    ("gpus", "more"),
    [
        (
            0,
            {
                "enforce_eager": True,
                "kv_cache_memory_bytes": KV_CACHE_BYTES,
                "distributed_executor_backend": "uni",
            },
        ),
        (0.5, {}),
        (1, {}),
        (2, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
        (8.0, {"tensor_parallel_size": 8, "distributed_executor_backend": "mp"}),
    ],
)
def test_several_gpus_of_an_actor_share_the_model(gpus: float, more: dict[str, object]) -> None:
    arguments = engine_arguments(Path("m"), 512, gpus, 7)
    assert arguments == COMMON | more
    assert isinstance(arguments.get("tensor_parallel_size", 1), int)
    assert VllmSettings(weights="m", gpus=gpus).gpus_per_actor == gpus


def recipe(folder: Path, gpus: float) -> Path:
    path = folder / "recipe.yaml"
    (folder / "seeds.jsonl").write_text('{"instruction": "Name a colour."}\n')
    path.write_text(
        f"models:\n  base: {{weights: owner/name, gpus: {gpus}}}\n"
        "stages:\n  prompts: {kind: prompts, seeds: seeds.jsonl}\n"
    )
    return path


@pytest.mark.parametrize("gpus", [1.5, 2.5, -1])
def test_an_invalid_number_of_gpus_is_one_line(gpus: float, tmp_path: Path) -> None:
    with pytest.raises(Permanent) as error:
        load(recipe(tmp_path, gpus), KINDS)
    line = str(error.value)
    assert "model 'base': setting 'gpus': " in line and f"(got {gpus})" in line
    assert "\n" not in line
    if gpus > 0:
        assert "must be a fraction of one GPU or a whole number" in line


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 2, 4.0])
def test_fractions_of_a_gpu_and_whole_gpus_are_accepted(gpus: float, tmp_path: Path) -> None:
    base = load(recipe(tmp_path, gpus), KINDS).models["base"]
    assert base.settings.gpus_per_actor == gpus
