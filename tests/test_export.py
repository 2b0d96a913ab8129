"""Tests `zephyr export`: data sets and models that libraries load, their cards, and pushing."""

import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import READS, WRITES, Hub, hub

from zephyr_ray import cli
from zephyr_ray.export import columns, data_folder, model_folder
from zephyr_ray.export.licenses import license_of_folder
from zephyr_ray.export.lineage import read_lineage, sources
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.recipe import load
from zephyr_ray.run_folder import link_artifact
from zephyr_ray.store import Store, write_rows

RECIPE = """
name: small
seed: 7
models:
  base: {weights: me/base, temperature: 0.3}
  student: {weights: sft, temperature: 0.9}
  judge: {engine: rules}
  critic: {engine: openai, model: large, base_url: "https://api.example.com/v1"}
stages:
  taught: {kind: published, makes: dialogues, dataset: me/taught}
  tasks: {kind: prompts, seeds: tasks.jsonl}
  sft: {kind: sft, model: base, data: taught}
  answers_base: {kind: completions, models: [base], prompts: tasks}
  answers: {kind: completions, models: [student], prompts: tasks, max_tokens: 99}
  scores: {kind: feedback, judge: critic, completions: answers}
  winrate: {kind: pairwise, judge: judge, answers: [answers], baseline: answers_base}
"""
COUNTS = {
    "taught": {"rows": 2, "dropped/empty": 1},
    "winrate": {"win_rate/sft": 0.75, "shortened/sft": 2},
}
EXAMPLES = {"winrate": {"shortened/sft": ["1", "2"]}}
ROWS: list[dict[str, Any]] = [
    {"id": "1", "constraint": None, "score": 8, "texts": [], "messages": [{"role": "user"}]},
    {
        "id": "2",
        "constraint": {"kind": "ends_with", "text": "so"},
        "score": 7.5,
        "texts": [["a", "b"], []],
        "messages": [{"role": "user"}, {"role": "assistant", "finish_reason": "stop"}],
    },
    {
        "id": "3",
        "constraint": {"kind": "words", "n": 3},
        "score": None,
        "texts": [],
        "messages": [],
    },
]


def make_run(
    folder: Path,
    recipe: str = RECIPE,
    model: Path | None = None,
    rows: dict[str, list[dict[str, Any]]] | None = None,
) -> Path:
    """Makes the missing artifacts of a recipe, as a run commits them, and returns the run's folder.
    `rows` replaces ROWS for the stages that it names."""
    (folder / "tasks.jsonl").write_text('{"instruction": "Say hello."}\n')
    (folder / "small.yaml").write_text(recipe)
    loaded, store = load(folder / "small.yaml", KINDS), Store(folder / "runs")
    view, artifacts = store.storage / loaded.name, {}
    for step in make_plan(loaded, store):
        stage, part = step.stage, store.folder(step.stage.kind, step.key)
        if step.artifact:
            artifacts[step.name] = step.artifact
            continue
        part.mkdir(parents=True)
        if not stage.trains_model:
            write_rows(part, (rows or {}).get(step.name, ROWS))
        elif model:
            shutil.copytree(model, part / "model")
        else:
            (part / "model").mkdir()
        if step.name == "winrate":
            (part / "result.json").write_text("{}")
        models = {n: m.to_model(artifacts) for n, m in loaded.models_read(stage).items()}
        artifacts[step.name] = store.commit(
            stage.kind,
            step.key,
            identity=step.identity,
            name=step.name,
            recipe=loaded.name,
            settings=stage.model_dump(mode="json"),
            reads={name: artifacts[name].key for name in loaded.stages_read(stage)},
            models={name: model.facts() for name, model in models.items()},
            counts=COUNTS.get(step.name, {"rows": len(ROWS)}),
            examples=EXAMPLES.get(step.name, {}),
            created="2026-11-26T15:00:00+00:00",
        )
        link_artifact(view, step.name, stage.view, part)
    return view


def export(run: Path, stage: str, *options: str) -> Path:
    """Exports a stage and returns the folder."""
    folder = run.parent / f"exported-{stage}"
    assert cli.main(["export", str(run), stage, str(folder), *options]) == 0
    return folder


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the front matter and the text of a card."""
    _, front_matter, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front_matter), text


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Any:
    from huggingface_hub import constants

    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


def test_a_data_set_loads_with_the_rows_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import load_dataset

    monkeypatch.setattr(data_folder, "SHARD_BYTES", 10)  # so that each row has its own file
    folder = export(make_run(tmp_path), "scores")
    assert len(list((folder / "data").iterdir())) == len(ROWS)
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(loaded["train"]) == ROWS
    assert loaded["train"].features["score"].dtype == "float64"


def test_types_that_do_not_fit_together_are_kept_as_json() -> None:
    rows = [{"a": 1, "b": [1], "c": {"x": 1}}, {"a": "1", "b": ["1"], "c": {"x": 2.5}, "d": True}]
    types = {"a": "json", "b": ["json"], "c": {"x": "float64"}, "d": "bool"}
    assert columns.column_types(rows) == types


def test_an_integer_of_more_than_64_bits_loads_as_a_float(tmp_path: Path) -> None:
    from datasets import load_dataset

    scores = [8, 10**19, -(2**63) - 1, 10**40]
    rows = [{"id": "1", "completions": [{"score": score}]} for score in scores]
    folder = export(make_run(tmp_path, rows={"scores": rows}), "scores")
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert [row["completions"][0]["score"] for row in loaded["train"]] == list(map(float, scores))


def test_a_model_loads_with_its_weights_in_the_requested_precision(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(model_folder, "SHARD_BYTES", 200_000)
    folder = export(make_run(tmp_path, model=tiny_model), "sft", "--dtype", "bf16")
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    # The largest tensor, the embedding of 1,000 × 128 numbers, does not fit a shard.
    assert sorted(path.stat().st_size for path in shards)[-2] < 210_000
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert before.keys() == after.keys()
    for name, weights in after.items():
        assert weights.dtype == torch.bfloat16
        assert torch.equal(weights, before[name].to(torch.bfloat16))
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, tiny_model))
    assert ours.chat_template == theirs.chat_template
    assert (folder / "generation_config.json").read_bytes() == (
        tiny_model / "generation_config.json"
    ).read_bytes()


def test_the_recipe_of_a_card_makes_the_same_artifacts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    _, text = card(export(run, "scores"))
    [recipe] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    steps = make_plan(load(tmp_path / "recipe.yaml", KINDS), Store(run.parent))
    assert [step.name for step in steps if step.artifact] == [
        *("taught", "sft", "tasks", "answers", "scores")
    ]
    assert "`zephyr run recipe.yaml --until scores`" in text
    assert "| model | `large at https://api.example.com/v1` | terms of its provider |" in text


ENDPOINT = 'engine: openai, base_url: "https://api.example.com/v1"'
BEFORE = f"""
name: before
models:
  m: {{{ENDPOINT}, model: large}}
  base: {{weights: me/base}}
stages:
  tasks: {{kind: prompts, seeds: tasks.jsonl}}
  taught: {{kind: self_refine, model: m, prompts: tasks}}
  sft: {{kind: sft, model: base, data: taught}}
  dialogues: {{kind: self_refine, model: sft, prompts: tasks}}
"""
AFTER = f"""
name: after
models:
  teacher: {{{ENDPOINT}, model: large}}
  m: {{{ENDPOINT}, model: small}}
  base: {{weights: me/base}}
stages:
  tasks: {{kind: prompts, seeds: tasks.jsonl}}
  taught: {{kind: self_refine, model: teacher, prompts: tasks}}
  first: {{kind: sft, model: base, data: taught}}
  dialogues: {{kind: self_refine, model: first, prompts: tasks}}
  sft: {{kind: sft, model: first, data: dialogues}}
  more: {{kind: self_refine, model: sft, prompts: tasks}}
  last: {{kind: sft, model: base, data: more}}
  answers: {{kind: completions, models: [m, last], prompts: tasks}}
  scores: {{kind: feedback, judge: m, completions: answers}}
"""


def test_a_card_tells_different_models_of_one_name_apart(tmp_path: Path) -> None:
    """The names `m` and `sft` had other meanings when a part of the artifacts was made."""
    make_run(tmp_path, BEFORE)
    run = make_run(tmp_path, AFTER)
    (tmp_path / "small.yaml").write_text(AFTER)
    made = {s.key for s in make_plan(load(tmp_path / "small.yaml", KINDS), Store(run.parent))}
    _, text = card(export(run, "scores"))
    [recipe] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    steps = make_plan(load(tmp_path / "recipe.yaml", KINDS), Store(run.parent))
    assert {step.key for step in steps} == made
    models = yaml.safe_load(recipe)["models"]
    assert {name: s.get("model") for name, s in models.items()} == {
        **{"m-2": "large", "base": None, "m": "small"},
    }


@pytest.mark.parametrize("path", ["../../clients/acme/tasks.jsonl", "data/../../acme/tasks.jsonl"])
def test_a_card_names_no_folder_outside_that_of_the_recipe(tmp_path: Path, path: str) -> None:
    recipe = tmp_path / "own" / "recipes"
    (recipe / "data").mkdir(parents=True)
    seeds = recipe / path
    seeds.resolve().parent.mkdir(parents=True)
    seeds.write_text('{"instruction": "Say hello."}\n')
    run = make_run(recipe, RECIPE.replace("seeds: tasks.jsonl", f"seeds: {path}"))
    _, text = card(export(run, "scores"))
    assert "seeds: tasks.jsonl\n" in text and "| file | `tasks.jsonl` | unknown |" in text
    assert "acme" not in text


def test_files_of_one_name_keep_their_licenses(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    for folder in ("shipped", "acme"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tasks.jsonl").write_text(f'{{"instruction": "{folder}"}}\n')
    (tmp_path / "own").mkdir()
    run = make_run(
        tmp_path / "own",
        """
name: small
models: {judge: {engine: rules}, base: {weights: me/base}}
stages:
  ours: {kind: prompts, seeds: ../shipped/tasks.jsonl}
  theirs: {kind: prompts, seeds: ../acme/tasks.jsonl}
  answers: {kind: self_refine, model: base, prompts: ours}
  sft: {kind: sft, model: base, data: answers}
  scores: {kind: completions, models: [sft], prompts: theirs}
""",
    )
    steps = read_lineage((run / "data" / "scores").resolve(), KINDS)
    found = [s for s in sources(steps, shipped) if s.what == "file"]
    licenses = [("tasks.jsonl", "apache-2.0"), ("tasks.jsonl", "unknown")]
    assert sorted((s.name, s.license) for s in found) == licenses


def test_a_model_card_states_sources_counts_results_and_limits(
    tmp_path: Path, tiny_model: Path, online: Hub
) -> None:
    online.cards |= {"models/me/base": {"license": "mit"}, "datasets/me/taught": {"license": "mit"}}
    front_matter, text = card(export(make_run(tmp_path, model=tiny_model), "sft"))
    assert front_matter["license"] == "mit"
    assert (front_matter["base_model"], front_matter["datasets"]) == ("me/base", ["me/taught"])
    assert "| model | `me/base` | mit |" in text
    assert "| data set | `me/taught` | mit |" in text
    assert "| `taught` | published |  | rows 2, dropped/empty 1 |" in text
    assert "| winrate | win_rate | 0.750 |" in text
    assert "| winrate | shortened |" not in text  # a count of rows, not a metric
    assert "- Nothing measured the safety or the biases of the model." in text


def test_different_licenses_are_left_to_a_person(
    tmp_path: Path, tiny_model: Path, online: Hub
) -> None:
    online.cards |= {"models/me/base": {"license": "mit"}, "datasets/me/taught": {}}
    front_matter, text = card(export(make_run(tmp_path, model=tiny_model), "sft"))
    assert front_matter["license"] == "unknown"
    assert "| data set | `me/taught` | unknown |" in text
    assert "- The sources have different or unknown licenses" in text


def test_a_card_says_that_a_source_was_deleted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree((run / "data" / "tasks").resolve())
    _, text = card(export(run, "scores"))
    assert "- `tasks`, which `answers` read, was deleted: its sources are not listed." in text
    assert "| data set | `me/taught`" in text


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path, tiny_model: Path) -> None:
    run = make_run(tmp_path, RECIPE.replace("me/base", str(tiny_model)), tiny_model)
    front_matter, text = card(export(run, "sft"))
    assert "base_model" not in front_matter
    assert f"| model | `{tiny_model.name}` | unknown |" in text
    assert str(tiny_model.parent) not in text and str(tmp_path) not in text


def test_a_card_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEPHYR_TEST_TOKEN", "tasks.jsonl")
    _, text = card(export(make_run(tmp_path), "scores"))
    assert "tasks.jsonl" not in text and "***" in text


@pytest.mark.parametrize(
    ("name", "content", "license"),
    [
        ("README.md", "---\nlanguage: en\nlicense: Apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("README.md", "# A model\nlicense: mit\n", "unknown"),
        ("LICENSE", "\n   MIT License\n\nCopyright", "mit"),
        ("LICENSE.txt", "SOME COMMUNITY LICENSE", "other"),
        ("config.json", '{"license": "gemma"}', "gemma"),
    ],
)
def test_the_license_that_a_folder_states(
    tmp_path: Path, name: str, content: str, license: str
) -> None:
    (tmp_path / name).write_text(content)
    assert license_of_folder(tmp_path) == license


def test_a_push_uploads_the_folder_to_a_private_repository(
    tmp_path: Path, online: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)
    folder = export(make_run(tmp_path), "scores", "--push", "me/scores")
    assert online.repositories["datasets/me/scores"]["visibility"] == "private"
    exported = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    assert online.files["datasets/me/scores"] == {n: f.read_bytes() for n, f in exported.items()}


def test_a_push_to_an_existing_repository_updates_it(
    tmp_path: Path, online: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)
    online.repositories["datasets/me/scores"] = {"visibility": "public"}
    online.files["datasets/me/scores"] = {"README.md": b"old", "notes.txt": b"kept"}
    folder = export(make_run(tmp_path), "scores", "--push", "me/scores")
    stored = online.files["datasets/me/scores"]
    assert stored["README.md"] == (folder / "README.md").read_bytes()
    assert stored["notes.txt"] == b"kept"


def test_a_push_to_storage_in_chunks(tmp_path: Path, online: Hub) -> None:
    online.chunks = str(tmp_path / "chunks")
    folder = tmp_path / "exported"
    arguments = ["export", make_run(tmp_path), "scores", folder, "--push", "me/scores"]
    # In its own process, because the client's library for chunks does not support forking.
    subprocess.run(
        [sys.executable, "-m", "zephyr_ray.cli", *arguments],
        env={**os.environ, "HF_ENDPOINT": online.url, "HF_TOKEN": WRITES, "HF_HOME": str(tmp_path)},
        check=True,
    )
    [data] = (folder / "data").iterdir()
    pointer = online.pointers[f"data/{data.name}"]
    assert pointer["oid"] == sha256(data.read_bytes()).hexdigest()
    assert list(Path(online.chunks).rglob("default.*"))


@pytest.mark.parametrize(
    ("token", "fault"),
    [
        ("", "--push needs HF_TOKEN, which is not set"),
        ("wrong-token", "the hub rejects the token in HF_TOKEN"),
        (READS, "the token in HF_TOKEN may not write there"),
    ],
)
def test_a_push_without_a_writing_token_is_one_line_and_writes_nothing(
    tmp_path: Path,
    online: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    token: str,
    fault: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    folder = tmp_path / "exported"
    arguments = ["export", str(make_run(tmp_path)), "scores", str(folder), "--push", "me/scores"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert not token or token not in error
    assert not folder.exists()


def test_a_push_that_fails_leaves_the_folder_to_upload(
    tmp_path: Path,
    online: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)
    online.refuses = "/commit/"
    folder = tmp_path / "exported"
    arguments = ["export", str(make_run(tmp_path)), "scores", str(folder), "--push", "me/scores"]
    assert cli.main(arguments) == 2
    assert f"hf upload --repo-type dataset me/scores {folder}" in capsys.readouterr().err
    assert (folder / "README.md").exists()


def test_an_impossible_export_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path)
    (tmp_path / "here").mkdir()
    for stage, folder, options, fault in [
        ("score", "new", [], "did you mean 'scores'?"),
        ("scores", "new", ["--dtype", "bf16"], "'scores' is a data set; remove --dtype"),
        ("scores", "here", [], "here exists already"),
        ("scores", "new", ["--push", "scores"], "write owner/name"),
    ]:
        assert cli.main(["export", str(run), stage, str(tmp_path / folder), *options]) == 2
        assert fault in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
