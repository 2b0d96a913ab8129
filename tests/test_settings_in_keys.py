"""Tests which settings of every stage kind and engine are in the content key.

Settings that change the result are in the key, or a stale artifact would be reused. Settings that
only affect how the work runs are not, or a machine with more memory would repeat the work.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.engines import ENGINES
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.recipe import load
from zephyr_ray.store import Store
from zephyr_ray.train.settings import Lora

MODELS = """
models:
  a: {weights: owner/a}
  b: {weights: owner/b}
  again: {weights: owner/a}
  judge: {engine: rules}
  strict: {engine: rules, relevance_min: 0.5}
"""
RECIPE = f"""{MODELS}
stages:
  prompts: {{kind: prompts, seeds: seeds.jsonl}}
  other_prompts: {{kind: prompts, seeds: other.jsonl}}
  self_instruct: {{kind: self_instruct, model: a, seeds: seeds.jsonl, count: 5}}
  self_refine: {{kind: self_refine, model: a, prompts: prompts}}
  other_dialogues: {{kind: self_refine, model: b, prompts: prompts}}
  sft: {{kind: sft, model: a, data: self_refine}}
  completions: {{kind: completions, models: [a], prompts: prompts}}
  other_completions: {{kind: completions, models: [b], prompts: prompts}}
  more_completions: {{kind: completions, models: [b, a], prompts: prompts}}
  feedback: {{kind: feedback, judge: again, completions: completions}}
  other_feedback: {{kind: feedback, judge: strict, completions: completions}}
  preferences: {{kind: preferences, feedback: feedback}}
  other_pairs: {{kind: preferences, feedback: other_feedback}}
  clean: {{kind: clean, dialogues: self_refine, judge: judge}}
  chosen: {{kind: chosen, pairs: preferences}}
  reference: {{kind: reference, model: a, data: preferences}}
  dpo: {{kind: dpo, model: a, data: preferences, loss: {{robust: 1, simpo: 1}}}}
  pairwise: {{kind: pairwise, judge: a, answers: [other_completions], baseline: completions}}
  mt_bench_answers: {{kind: mt_bench_answers, models: [a]}}
  other_answers: {{kind: mt_bench_answers, models: [b], questions: two_turns.jsonl}}
  mt_bench: {{kind: mt_bench, judge: b, answers: [mt_bench_answers]}}
  swapped: {{kind: pairwise, judge: judge, answers: [completions], baseline: other_completions}}
  leaderboard: {{kind: leaderboard, of: [pairwise]}}
  likelihood: {{kind: likelihood, models: [a], tasks: [sciq]}}
  report: {{kind: report, of: [sft]}}
  votes: {{kind: votes, file: votes.jsonl}}
  other_votes: {{kind: votes, file: other_votes.jsonl}}
  corrected: {{kind: corrected, winrate: pairwise, votes: votes, judge: judge}}
  published: {{kind: published, makes: prompts, dataset: owner/set}}
  outputs: {{kind: outputs, prompts: prompts, file: outputs.jsonl}}
"""

TASKS = {"seeds": "other.jsonl", "count": 3, "constrained": 0.5, "seed": 1}
TRAINING = {
    "model": "b",
    "learning_rate": 0.1,
    "schedule": "constant_with_warmup",
    "epochs": 7,
    "global_batch": 64,
    "max_length": 333,
    "warmup": 0.2,
    "weight_decay": 0.1,
    "max_grad_norm": 2,
    "precision": "fp32",
    "bad_rows": "stop",
    "validation": 0.1,
    "lora": {},
    "seed": 1,
}
IN_KEY: dict[str, dict[str, Any]] = {
    "prompts": TASKS,
    "self_instruct": TASKS | {"model": "b", "apart_from": "prompts", "max_similarity": 0.5},
    "self_refine": {
        "model": "b",
        "prompts": "other_prompts",
        "turns": 3,
        "max_tokens": 9,
        "seed": 1,
    },
    "clean": {
        "dialogues": "other_dialogues",
        "prompts": "prompts",
        "pairs": "preferences",
        "judge": "strict",
        "min_score": 5,
        "apart_from": "prompts",
        "evaluation_sets": "seeds.jsonl",
        "near_duplicates": 0.8,
        "languages": ["en"],
        "min_words": 2,
        "max_words": 9,
        "refusals": "drop",
        "toxic_words": "seeds.jsonl",
        "seed": 1,
    },
    "sft": TRAINING | {"data": "other_dialogues", "packing": False},
    "completions": {
        "models": ["b"],
        "prompts": "other_prompts",
        "per_prompt": 3,
        "principles": True,
        "max_tokens": 9,
        "seed": 1,
    },
    "feedback": {
        "judge": "strict",
        "completions": "other_completions",
        "forms": ["critique"],
        "rated_again": 0.5,
        "seed": 1,
    },
    "preferences": {
        "feedback": "other_feedback",
        "score": "overall",
        "rejected": "all",
        "ties": "keep",
        "min_margin": 1,
        "min_chosen": 5,
        "seed": 1,
    },
    "chosen": {"pairs": "other_pairs"},
    "dpo": TRAINING
    | {
        "data": "other_pairs",
        "beta": 0.5,
        "loss": "simpo",
        "label_smoothing": 0.1,
        "simpo_gamma": 1.0,
        "nll_weight": 1,
        "reference": "reference",
    },
    "pairwise": {
        "judge": "strict",
        "form": "brackets",
        "answers": ["other_completions", "more_completions"],
        "baseline": "more_completions",
        "control": "more_completions",
        "seed": 1,
    },
    "mt_bench_answers": {
        "models": ["b"],
        "questions": "two_turns.jsonl",
        "max_tokens": 9,
        "seed": 1,
    },
    "mt_bench": {
        "judge": "a",
        "answers": ["other_answers"],
        "baseline": "a",
        "seed": 1,
    },
    "leaderboard": {"of": ["swapped"], "style_control": True},
    "outputs": {"prompts": "other_prompts", "file": "other.jsonl"},
    "likelihood": {
        "models": ["a", "b"],
        "tasks": {"sciq": {"shots": 5}},
        "questions": "seeds.jsonl",
        "data": "hub",
        "folder": "seeds.jsonl",
        "limit": 3,
        "context": 99,
        "seed": 1,
    },
    "reference": {"data": "other_pairs", "model": "b", "quantized": True}
    | {name: TRAINING[name] for name in ("max_length", "precision", "bad_rows")},
    "report": {"released": {"prompts": {"rows": 3}}, "of": ["dpo"], "title": "Mine"},
    "votes": {"file": "other_votes.jsonl"},
    "corrected": {
        "winrate": "swapped",
        "votes": "other_votes",
        "judge": "strict",
        "seed": 1,
    },
    "published": {
        "makes": "pairs",
        "dataset": "owner/other",
        "files": "seeds.jsonl",
        "split": "test",
        "revision": "v2",
        "columns": {"prompt": "question"},
        "limit": 3,
        "ties": "drop",
        "exclude": {"source": ["truthful_qa"]},
    },
}
"""Settings that change the result, by kind, each with a value that differs from the recipe's."""
HOW_IT_SCORES = {
    "max_failed": 0.5,
    "zero": 1,
    "workers": 2,
    "cpus_per_worker": 2,
    "gpus_per_worker": 1,
    "micro_batch": 1,
    "offload": "all",
}
HOW_IT_TRAINS = HOW_IT_SCORES | {
    "gradient_checkpointing": True,
    "optimizer": "paged_adamw_32bit",
    "checkpoint_every": 3,
    "validate_every": 3,
}
ROW_PROGRAMS = (
    *("self_instruct", "self_refine", "clean", "completions", "feedback", "pairwise"),
    *("mt_bench_answers", "mt_bench"),
)
NOT_IN_KEY: dict[str, dict[str, Any]] = {
    "sft": HOW_IT_TRAINS,
    "dpo": HOW_IT_TRAINS,
    "reference": HOW_IT_SCORES,
    "published": {"max_failed": 0.5},
    "corrected": {"max_failed": 0.5, "give_up": ["v0"]},
    "outputs": {"max_failed": 0.5},
} | dict.fromkeys(ROW_PROGRAMS, {"max_failed": 0.5, "give_up": ["p0"]})

MODEL: dict[str, dict[str, Any]] = {
    "vllm": {"engine": "vllm", "weights": "owner/a"},
    "openai": {"engine": "openai", "model": "m", "base_url": "http://a/v1"},
    "rules": {"engine": "rules"},
    "reward": {"engine": "reward", "weights": "owner/a"},
    "likelihood": {"engine": "likelihood", "weights": "owner/a"},
    "service": {"engine": "service", "base_url": "http://a"},
}
SAMPLING = {
    "temperature": 0.1,
    "top_p": 0.5,
    "demonstrations": "seeds.jsonl",
    "questions": "questions.yaml",
    "context": 99,
}
PROCESSES = {"actors": 3, "concurrency": 3}
MODEL_IN_KEY: dict[str, dict[str, Any]] = {
    "vllm": SAMPLING | {"weights": "owner/b"},
    "openai": SAMPLING
    | {"base_url": "http://b/v1", "model": "n", "parameters": {"reasoning_effort": "low"}},
    "rules": {"relevance": "owner/encoder", "relevance_min": 0.5},
    "reward": {"weights": "owner/b", "context": 99},
    "likelihood": {"weights": "owner/b", "context": 99},
    "service": {"base_url": "http://b"},
}
MODEL_NOT_IN_KEY: dict[str, dict[str, Any]] = {
    "vllm": PROCESSES | {"gpus": 2},
    "openai": PROCESSES
    | {"api_key_env": "OTHER_KEY", "price": [1, 2]}
    | {"requests_per_minute": 60, "tokens_per_minute": 9000, "batch": True},
    "rules": PROCESSES,
    "reward": PROCESSES | {"gpus": 1},
    "likelihood": PROCESSES | {"gpus": 1},
    "service": PROCESSES | {"api_key_env": "OTHER_KEY"},
}
VOTE = {
    **{"prompt": "Name a pet.", "instruction": "Name a pet.", "constraint": None},
    "completions": [{"model": "a", "text": "b", "finish_reason": "stop", "score": 5}] * 2,
}
ASKS = """
  prompts: {kind: prompts, seeds: seeds.jsonl}
  asks: {kind: completions, models: [x], prompts: prompts}
"""
JUDGES = """
  prompts: {kind: prompts, seeds: seeds.jsonl}
  answers: {kind: completions, models: [a], prompts: prompts}
  judges: {kind: feedback, judge: x, completions: answers}
"""
TRAINS = """
  data: {kind: published, makes: dialogues, dataset: owner/set}
  trains: {kind: sft, model: x, data: data}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a colour."}\n')
    (tmp_path / "outputs.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"instruction": "Name a fruit."}\n')
    two_turns = {"question_id": 1, "category": "math", "turns": ["What is 2 + 2?", "And 3 + 3?"]}
    (tmp_path / "two_turns.jsonl").write_text(json.dumps(two_turns))
    for name in ("votes", "other_votes"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**VOTE, "id": name}))
    (tmp_path / "questions.yaml").write_text("score: $prompt $answer $reply\n")
    return tmp_path


def keys(folder: Path, *overrides: str) -> dict[str, str]:
    recipe = load(folder / "recipe.yaml", KINDS, list(overrides))
    return {step.name: step.key for step in make_plan(recipe, Store(folder / "runs"))}


def in_key(folder: Path, stage: str, prefix: str, values: dict[str, Any]) -> dict[str, bool]:
    """Returns, by setting, whether the new value changes the key of a stage."""
    before = keys(folder)[stage]
    return {
        name: keys(folder, f"{prefix}.{name}={json.dumps(value)}")[stage] != before
        for name, value in values.items()
    }


def table(hashed: dict[str, Any], unhashed: dict[str, Any]) -> dict[str, bool]:
    return dict.fromkeys(hashed, True) | dict.fromkeys(unhashed, False)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_a_stage(kind: str, folder: Path) -> None:
    hashed, unhashed = IN_KEY[kind], NOT_IN_KEY.get(kind, {})
    assert {*hashed, *unhashed} == set(KINDS[kind].model_fields)
    assert in_key(folder, kind, kind, hashed | unhashed) == table(hashed, unhashed)


def test_settings_of_adapters(folder: Path) -> None:
    values = {"r": 4, "alpha": 4, "dropout": 0.1, "targets": ["q_proj"], "quantized": True}
    assert set(values) == set(Lora.model_fields)
    text = RECIPE.replace("{kind: sft, ", "{kind: sft, lora: {}, ")
    (folder / "recipe.yaml").write_text(text)
    assert in_key(folder, "sft", "sft.lora", values) == table(values, {})


def uses(engine: str, use: str) -> bool:
    return use in ENGINES[engine].uses


@pytest.mark.parametrize(
    ("engine", "stage", "stages"),
    [
        *((e, "asks", ASKS) for e in ENGINES if uses(e, "model")),
        *((e, "judges", JUDGES) for e in ENGINES if uses(e, "judge")),
    ],
)
def test_settings_of_an_engine(engine: str, stage: str, stages: str, folder: Path) -> None:
    hashed, unhashed = MODEL_IN_KEY[engine], MODEL_NOT_IN_KEY[engine]
    assert {"engine", *hashed, *unhashed} == set(ENGINES[engine].model_fields)
    write_model(folder, MODEL[engine], stages)
    assert in_key(folder, stage, "models.x", hashed | unhashed) == table(hashed, unhashed)


def write_model(folder: Path, model: dict[str, Any], stages: str) -> None:
    text = f"{MODELS}  x: {json.dumps(model)}\nstages:{stages}"
    (folder / "recipe.yaml").write_text(text)


@pytest.mark.parametrize("engine", [e for e in ENGINES if uses(e, "weights")])
def test_training_depends_only_on_the_weights_of_its_model(engine: str, folder: Path) -> None:
    values = MODEL_IN_KEY[engine] | MODEL_NOT_IN_KEY[engine]
    write_model(folder, MODEL[engine], TRAINS)
    expected = dict.fromkeys(values, False) | {"weights": True}
    assert in_key(folder, "trains", "models.x", values) == expected


def test_an_engine_is_in_the_key(folder: Path) -> None:
    # An endpoint and a served judge at the same address, and rules.
    made = []
    for engine in ("openai", "service", "rules"):
        write_model(folder, MODEL[engine] | {"engine": engine}, JUDGES)
        made.append(keys(folder, *(["models.x.base_url=http://a"] if engine == "openai" else [])))
    assert len({made_keys["judges"] for made_keys in made}) == 3
    assert all(ENGINES[e].model_validate(MODEL[e]).identity()["engine"] == e for e in ENGINES)


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        ({"sigmoid": 1}, {}),
        ("ipo", {"loss": {"ipo": 1}}),
        ({"sigmoid": 1, "nll": 0.2}, {"nll_weight": 0.2}),
        ({"ipo": 1, "hinge": 2}, {"loss": {"hinge": 2.0, "ipo": 1.0}}),
    ],
)
def test_equal_losses(loss: Any, same: dict[str, Any], folder: Path) -> None:
    def key(settings: dict[str, Any]) -> str:
        stage = json.dumps({"kind": "dpo", "model": "a", "data": "preferences"} | settings)
        (folder / "recipe.yaml").write_text(RECIPE + f"  stage: {stage}\n")
        return keys(folder)["stage"]

    assert key({"loss": loss}) == key(same)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_and_its_version(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(folder)[kind]
    monkeypatch.setattr(KINDS[kind], "version", KINDS[kind].version + 1)
    raised = keys(folder)[kind]
    monkeypatch.setattr(KINDS[kind], "kind", "another")
    assert len({before, raised, keys(folder)[kind]}) == 3


def test_names_and_order_of_a_pool_are_in_the_key(folder: Path) -> None:
    pools = (["a", "b"], ["b", "a"], ["again", "b"], ["a"], ["again"])
    made = {keys(folder, f"completions.models={json.dumps(p)}")["completions"] for p in pools}
    assert len(made) == len(pools)


def test_the_name_of_a_single_model_is_in_no_key(folder: Path) -> None:
    assert keys(folder, "self_refine.model=again") == keys(folder)


@pytest.mark.parametrize(
    ("setting", "stage", "stages"), [("weights", "asks", ASKS), ("relevance", "judges", JUDGES)]
)
def test_folders_of_weights_are_hashed_by_content_not_path(
    setting: str, stage: str, stages: str, folder: Path
) -> None:
    weights = folder / "tiny"
    weights.mkdir()
    (weights / "config.json").write_text('{"model_type": "bert"}')
    engine = {"weights": "vllm", "relevance": "rules"}[setting]
    write_model(folder, MODEL[engine] | {setting: "tiny"}, stages)
    before = keys(folder)[stage]
    shutil.copytree(weights, folder / "copy")
    assert keys(folder, f"models.x.{setting}=copy")[stage] == before
    (weights / "config.json").write_text('{"model_type": "bert", "hidden_size": 2}')
    assert keys(folder)[stage] != before
