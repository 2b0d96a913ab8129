"""Tests that each shipped recipe can be planned and has the published hyperparameters.

Sources: the Zephyr paper (arXiv 2310.16944), and the alignment handbook's zephyr-7b-beta recipes.
"""

from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.estimate import training
from zephyr_ray.estimate.printing import estimate_lines
from zephyr_ray.models.shapes import find_shape
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.preflight import check_files
from zephyr_ray.recipe import Recipe, load
from zephyr_ray.store import Store
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Common to all: AdamW without weight decay, bf16 matrix products, 10% warm-up.
COMMON = {"weight_decay": 0.0, "precision": "bf16", "warmup": 0.1, "gradient_checkpointing": True}
PAPER_SFT = {
    "learning_rate": 2e-5,
    "schedule": "cosine",
    "epochs": 1,
    "global_batch": 512,
    "max_length": 2048,
    "packing": True,
    "lora": None,
    "optimizer": "adamw",
    "zero": 3,
    "workers": 16,
}
PAPER_DPO = {
    "learning_rate": 5e-7,
    "schedule": "linear",
    "epochs": 3,
    "global_batch": 32,
    "max_length": 1024,
    "beta": 0.1,
    "nll_weight": 0.0,
    "lora": None,
    "optimizer": "adamw",
    "zero": 3,
    "workers": 16,
}
HANDBOOK_SFT = PAPER_SFT | {"global_batch": 128, "workers": 8}
HANDBOOK_DPO = PAPER_DPO | {
    "schedule": "cosine",
    "epochs": 1,
    "global_batch": 128,
    "beta": 0.01,
    "workers": 8,
}
QLORA = {"dropout": 0.05, "targets": SEVEN, "quantized": True}
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "zephyr-7b-paper": ("mistralai/Mistral-7B-v0.1", PAPER_SFT, PAPER_DPO),
    "zephyr-7b-handbook": ("mistralai/Mistral-7B-v0.1", HANDBOOK_SFT, HANDBOOK_DPO),
    "zephyr-7b-qlora": (
        "mistralai/Mistral-7B-v0.1",
        HANDBOOK_SFT
        | {"learning_rate": 2e-4, "global_batch": 64, "zero": 2}
        | {"lora": {"r": 16, "alpha": 16, **QLORA}},
        HANDBOOK_DPO
        | {"learning_rate": 5e-6, "zero": 2, "optimizer": "paged_adamw_32bit"}
        | {"lora": {"r": 128, "alpha": 128, **QLORA}},
    ),
    "zephyr-70b": (
        "meta-llama/Llama-2-70b-hf",
        PAPER_SFT | {"offload": "optimizer"},
        PAPER_DPO | {"offload": "optimizer"},
    ),
}
DEMO_KINDS = {
    *("prompts", "self_instruct", "self_refine", "clean", "sft", "completions", "feedback"),
    *("preferences", "chosen", "reference", "dpo", "pairwise", "leaderboard", "mt_bench_answers"),
    *("mt_bench", "likelihood", "report"),
}
STEPS = {
    # 139,161 packed sequences and 61,135 pairs over the global batch, rounded up.
    "zephyr-7b-paper": (272, 5732),
    "zephyr-7b-handbook": (1088, 478),
    "zephyr-7b-qlora": (2175, 478),
    "zephyr-70b": (272, 5732),
}


def read(name: str, tmp_path: Path) -> Recipe:
    return load(CONFIGS / f"{name}.yaml", KINDS, [f"storage={tmp_path / 'runs'}"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyperparameters_are_the_published_ones(name: str, tmp_path: Path) -> None:
    recipe, (weights, sft, dpo) = read(name, tmp_path), PUBLISHED[name]
    assert recipe.name == name
    for stage, published in (("sft", sft), ("dpo", dpo)):
        settings = recipe.stages[stage].model_dump()
        assert {key: settings[key] for key in COMMON | published} == COMMON | published
        assert recipe.models[stage].main.origin == weights
    sft_stage, dpo_stage = recipe.stages["sft"], recipe.stages["dpo"]
    assert isinstance(sft_stage, Sft) and isinstance(dpo_stage, Dpo)
    assert (sft_stage.data, dpo_stage.data) == ("ultrachat", "ultrafeedback")
    assert dpo_stage.model == "sft"


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_are_the_published_data_sets(name: str, tmp_path: Path) -> None:
    stages = read(name, tmp_path).stages
    chat, pairs = (stages[n].model_dump() for n in ("ultrachat", "ultrafeedback"))
    assert (chat["dataset"], chat["split"]) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert pairs["dataset"] == "HuggingFaceH4/ultrafeedback_binarized"
    assert pairs["split"] == "train_prefs"
    # All come before any training, so an unreachable hub fails before a GPU is requested.
    tests = {"ultrachat_test": "sft", "ultrafeedback_test": "dpo"}
    assert list(stages)[:4] == ["ultrachat", "ultrafeedback", *tests]
    for name, stage in tests.items():
        data = {"sft": chat, "dpo": pairs}[stage]
        split = data["split"].replace("train", "test")
        assert stages[name].model_dump() == data | {"split": split}
        assert stages[stage].model_dump()["validation"] == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_fits_and_has_the_published_steps(name: str, tmp_path: Path) -> None:
    recipe = read(name, tmp_path)
    check_files(recipe)
    steps = make_plan(recipe, Store(recipe.storage))
    text = "\n".join(estimate_lines(recipe, Store(recipe.storage), steps))
    assert "does not fit" not in text and text.count("  fits ") == 3
    assert "139,161 sequences in" in text and "285 M tokens" in text
    for count in STEPS[name]:
        assert f" {count:,} steps of " in text
    parameters = 68_976_648_192 if name == "zephyr-70b" else 7_241_732_096
    assert text.count(f"{parameters:,} parameters") == 3


def test_stated_hours_are_the_published_ones(tmp_path: Path) -> None:
    """SFT on 8 GPUs took 5,614 s; DPO ran at 8.1 to 14 pairs per second: 1.2 to 2.1 hours."""
    recipe = read("zephyr-7b-handbook", tmp_path)
    steps = make_plan(recipe, Store(recipe.storage))
    text = "\n".join(estimate_lines(recipe, Store(recipe.storage), steps))
    assert "1.6 h (at 24.83 sequences per second, as stated)" in text
    assert "2.1 h (at 8.1 pairs per second, as stated)" in text
    # Computed by hand from the share of training's FLOPs: 3 × 23,110 / 207,865 / 3 = 11.1% of
    # 1.56 h, and 6 × 2,000 / 61,135 / 3 = 6.5% of 2.1 h.
    assert "  validation  ≤ 23,110 rows, 3 times, 10 min more" in text
    assert "  validation  ≤ 2,000 rows, 6 times, 8 min more" in text


def test_70b_does_not_fit_without_offload(tmp_path: Path) -> None:
    recipe = read("zephyr-70b", tmp_path)
    shape = find_shape("meta-llama/Llama-2-70b-hf")
    stage = recipe.stages["sft"]
    assert shape and isinstance(stage, Sft)
    on_gpu = stage.model_copy(update={"offload": "none", "micro_batch": 2048})
    estimate = training.estimate(on_gpu, shape, recipe.hardware, 207_865, 1371.08, None)
    # 20 bytes per parameter over 16 GPUs are 80.3 GiB before the first activation.
    assert estimate.fits is False and estimate.memory.optimizer > 48e9
    assert estimate.advice == "offload: optimizer makes it fit"


STAGES = [
    *("heldout", "prompts", "dialogues", "clean", "sft", "completions", "feedback"),
    *("pairs", "reference", "dpo", "answers_base", "answers_sft", "answers_dpo"),
]
DEMOS = {
    "quickstart": [*STAGES, "winrate", "report"],
    "ablation": [
        *(*STAGES, "dpo_only", "chosen", "sft_twice", "answers_dpo_only", "answers_sft_twice"),
        *("two_turns", "mt_bench", "knowledge", "winrate_sft", "winrate", "leaderboard", "report"),
    ],
}


def demo(name: str, tmp_path: Path) -> Recipe:
    return load(CONFIGS / f"{name}.yaml", KINDS, [f"storage={tmp_path / 'runs'}"])


@pytest.mark.parametrize("name", DEMOS)
def test_every_stage_of_the_demos_is_planned(name: str, tmp_path: Path) -> None:
    recipe = demo(name, tmp_path)
    check_files(recipe)
    steps = make_plan(recipe, Store(recipe.storage))
    assert [step.name for step in steps] == DEMOS[name]
    rows = {step.name: step.rows for step in steps}
    # The number of questions is known only after the tasks are read.
    assert all(count for name, count in rows.items() if name not in ("knowledge", "leaderboard"))
    assert (rows["heldout"], rows["prompts"], rows["winrate"]) == (600, 160, 600)
    assert "smollm2-135m-instruct" in "\n".join(
        estimate_lines(recipe, Store(recipe.storage), steps)
    )


def test_the_ablation_reuses_the_artifacts_of_the_quickstart(tmp_path: Path) -> None:
    """Except the comparison, which has more models, and the report."""
    first, more = (
        {step.name: step.key for step in make_plan(recipe, Store(recipe.storage))}
        for recipe in (demo(name, tmp_path) for name in DEMOS)
    )
    assert {name for name in first if first[name] != more[name]} == {"winrate", "report"}


def test_the_demos_use_every_kind_that_needs_no_external_data(tmp_path: Path) -> None:
    kinds = {stage.kind for name in DEMOS for stage in demo(name, tmp_path).stages.values()}
    assert kinds == DEMO_KINDS


def test_the_shipped_recipes_use_these_kinds_and_published(tmp_path: Path) -> None:
    recipes = [demo(path.stem, tmp_path) for path in CONFIGS.glob("*.yaml")]
    kinds = {stage.kind for recipe in recipes for stage in recipe.stages.values()}
    assert kinds == {*DEMO_KINDS, "published"}


def test_feedback_from_endpoints_is_planned_within_its_budget(tmp_path: Path) -> None:
    recipe = demo("feedback-openai", tmp_path)
    check_files(recipe)
    steps = make_plan(recipe, Store(recipe.storage))
    rows = {step.name: step.rows for step in steps}
    assert rows["prompts"] == rows["completions"] == rows["feedback"] == 2000
    lines = estimate_lines(recipe, Store(recipe.storage), steps)
    assert "all endpoints: ≤ 20,400 calls, about $126.34" in lines
    assert "budget: $130.00, of which $0.00 are spent" in lines
