"""Tests a complete tiny recipe as a program with every stage kind, killed twice and run again.

Runs are expensive, so one fixture makes them in sequence and records what they did.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import train_once
from train_processes import in_place_of_ray

from zephyr_ray import pipeline
from zephyr_ray.recipe import load
from zephyr_ray.store import read_jsonl

RUN_SECONDS = 1800
pytestmark = pytest.mark.timeout(3000)  # one fixture makes all runs

RECIPE = """
name: tiny
models:
  # One row at a time, so that a kill hits the middle of the stage.
  base: {{weights: {weights}, temperature: 1.0, top_p: 1, concurrency: 1}}
  hot: {{weights: {weights}, temperature: 1.3, top_p: 1, concurrency: 8}}
  judge: {{engine: rules}}
stages:
  heldout: {{kind: prompts, seeds: heldout.jsonl}}
  grown: {{kind: self_instruct, model: base, seeds: seeds.jsonl, count: 30, apart_from: heldout}}
  dialogues: {{kind: self_refine, model: base, prompts: grown, turns: 2, max_tokens: 32}}
  clean: {{kind: clean, dialogues: dialogues}}
  sft:
    kind: sft
    model: base
    data: clean
    learning_rate: 1.0e-3
    global_batch: 3
    max_length: 256
    packing: false
    zero: 0
    checkpoint_every: 2
  completions: {{kind: completions, models: [base, hot], prompts: grown, max_tokens: 8}}
  feedback: {{kind: feedback, judge: judge, completions: completions}}
  pairs: {{kind: preferences, feedback: feedback, min_chosen: 1, ties: keep}}
  control: {{kind: chosen, pairs: pairs}}
  reference: {{kind: reference, model: sft, data: pairs, max_length: 256, zero: 2}}
  dpo:
    kind: dpo
    model: sft
    data: pairs
    reference: reference
    epochs: 1
    global_batch: 15
    max_length: 256
    zero: 2
  answers_base: {{kind: completions, models: [hot], prompts: heldout, max_tokens: 8}}
  answers_dpo: {{kind: completions, models: [dpo], prompts: heldout, max_tokens: 8}}
  winrate: {{kind: pairwise, judge: judge, baseline: answers_base, answers: [answers_dpo]}}
  knowledge: {{kind: likelihood, models: [hot, dpo], questions: mine.jsonl}}
  report: {{kind: report, of: [sft, dpo, feedback, knowledge, winrate]}}
"""
KINDS = {
    "heldout": "prompts",
    "grown": "self_instruct",
    "dialogues": "self_refine",
    "clean": "clean",
    "sft": "sft",
    "completions": "completions",
    "feedback": "feedback",
    "pairs": "preferences",
    "control": "chosen",
    "reference": "reference",
    "dpo": "dpo",
    "answers_base": "completions",
    "answers_dpo": "completions",
    "winrate": "pairwise",
    "knowledge": "likelihood",
    "report": "report",
}
LIST = " ".join(str(number) for number in range(40))
QUESTIONS = [
    ("Which word is green?", ["grass", "the red door of a house", "coal"]),
    # One token each, after a context of several blocks of the KV cache.
    (f"{LIST} {LIST} What is next?", ["a", "b", "c"]),
    # The choices share blocks of the KV cache with each other, not only with the context.
    (f"{LIST} {LIST} {LIST} And then?", [f"{LIST} {end}" for end in ("one", "two", "three")]),
]
THINGS = ["apples", "bridges", "doors", "engines", "forests", "gardens", "hats", "islands", "jars"]


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Program:
    """Runs the pipeline on one storage folder and preserves its journals by hard links.

    A stage removes its journals when it is done; a link preserves the file and later appends.
    """

    def __init__(self, folder: Path, weights: Path):
        self.folder, self.storage = folder, folder / "runs"
        self.recipe, self.preserved = folder / "tiny.yaml", folder / "preserved"
        self.recipe.write_text(RECIPE.format(weights=weights))
        for name, verb, first, count in (
            ("seeds", "Describe", 2, 34),
            ("heldout", "Draw up", 50, 8),
        ):
            tasks = [
                {"instruction": f"{verb} {number} {THINGS[number % 9]} in plain {style} words."}
                for number, style in zip(range(first, first + count), THINGS * 4, strict=False)
            ]
            text = "".join(json.dumps(task) + "\n" for task in tasks)
            (folder / f"{name}.jsonl").write_text(text)
        questions = [{"question": q, "choices": choices, "answer": 0} for q, choices in QUESTIONS]
        (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    def command(self, *arguments: str) -> list[str]:
        storage = f"storage={self.storage}"
        program = [sys.executable, "-m", "zephyr_ray.pipeline"]
        return [*program, str(self.recipe), "--set", storage, *arguments]

    def run(self, *arguments: str, kill_when: Callable[[], bool] | None = None) -> Ended:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        start, over = time.monotonic(), threading.Event()
        linker = threading.Thread(target=self._link_journals, args=(over,))
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            process = subprocess.Popen(
                self.command(*arguments), env=environment, stdout=out, stderr=err
            )
            linker.start()
            try:
                while process.poll() is None:
                    assert time.monotonic() - start < RUN_SECONDS, self.text("err")
                    if kill_when and kill_when():
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                    time.sleep(0.02)
            finally:
                process.kill()
                process.wait()
                over.set()
                linker.join()
        return Ended(process.returncode, self.text("out"), self.text("err"))

    def _link_journals(self, over: threading.Event) -> None:
        while not over.wait(0.05):
            # A stage may finish, and remove its folders, at this moment.
            with contextlib.suppress(FileNotFoundError):
                for path in self.storage.glob("store/*/scratch/*/*.jsonl"):
                    link = self.preserved / path.relative_to(self.storage / "store")
                    if not link.exists():
                        link.parent.mkdir(parents=True, exist_ok=True)
                        os.link(path, link)

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")

    def entries(self, kind: str, journal: str, preserved: bool = True) -> list[dict[str, Any]]:
        """Returns the entries of a stage's journals: all preserved ones, or only the current
        ones."""
        root = self.preserved if preserved else self.storage / "store"
        entries = []
        for path in sorted(root.glob(f"{kind}-*/scratch/{journal}/*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    continue  # empty, or truncated by the kill
        return entries

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """Returns manifests by the name of the artifact's folder."""
        paths = self.storage.glob("store/*/manifest.json")
        return {path.parent.name: json.loads(path.read_text()) for path in paths}

    def runs(self) -> list[dict[str, Any]]:
        """Returns the runs in the storage's MLflow database: name, status, parent and metric
        steps."""
        with sqlite3.connect(self.storage / "mlflow.db") as database:
            rows = database.execute(
                "select r.run_uuid, r.name, r.status, t.value from runs r left join tags t "
                "on t.run_uuid = r.run_uuid and t.key = 'mlflow.parentRunId'"
            ).fetchall()
            metrics = database.execute("select run_uuid, key, step from metrics").fetchall()
        return [
            {
                "id": run,
                "name": name,
                "status": status,
                "parent": parent,
                "steps": {(key, step) for owner, key, step in metrics if owner == run},
            }
            for run, name, status, parent in rows
        ]


@dataclass
class Seen:
    program: Program
    until: Ended
    artifacts_until: dict[str, dict[str, Any]]
    killed_text: Ended
    rows_before: list[dict[str, Any]]
    parents_before: list[str]
    killed_training: Ended
    steps_before: list[int]
    complete: Ended
    artifacts: dict[str, dict[str, Any]]
    runs: list[dict[str, Any]]
    again: Ended
    writes_of_again: int
    """Nanoseconds by which `again` moved mlflow.db's modification time; 0 if it did not write."""
    unfinished: Ended
    writes_of_unfinished: int
    left_running: list[str]
    plan: Ended
    changed: Ended
    artifacts_changed: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Seen:
    """Runs the program until a stage, kills it in a text stage and in training, completes it, and
    runs it again: unchanged, with unfinished MLflow runs, and with a changed setting."""
    program = Program(tmp_path_factory.mktemp("tiny"), tiny_model)
    until = program.run("--until", "heldout")
    artifacts_until = program.artifacts()

    killed_text = program.run(
        kill_when=lambda: len(program.entries("self_refine", "rows", preserved=False)) >= 4
    )
    rows_before = program.entries("self_refine", "rows")
    parents_before = [run["id"] for run in program.runs() if not run["parent"]]

    killed_training = program.run(kill_when=lambda: _has_checkpoint(program.storage))
    steps_before = [entry["step"] for entry in program.entries("sft", "steps")]

    complete = program.run()
    artifacts, runs = program.artifacts(), program.runs()
    shutil.copy(program.storage / "tiny" / "report.html", program.folder / "report.html")

    written = (program.storage / "mlflow.db").stat().st_mtime_ns
    again = program.run()
    writes_of_again = (program.storage / "mlflow.db").stat().st_mtime_ns - written
    # The state after a kill that follows the last manifest.
    (program.storage / "tiny" / ".unfinished").touch()
    [parent] = {run["parent"] for run in runs if run["name"] == "report"}
    with sqlite3.connect(program.storage / "mlflow.db") as database:
        database.execute("update runs set status = 'RUNNING' where run_uuid = ?", [parent])
    written = (program.storage / "mlflow.db").stat().st_mtime_ns
    unfinished = program.run()
    writes_of_unfinished = (program.storage / "mlflow.db").stat().st_mtime_ns - written
    left_running = [run["name"] for run in program.runs() if run["status"] == "RUNNING"]
    change = ("--set", "winrate.seed=7")
    plan = program.run(*change, "--plan")
    changed = program.run(*change)
    return Seen(
        program,
        until,
        artifacts_until,
        killed_text,
        rows_before,
        parents_before,
        killed_training,
        steps_before,
        complete,
        artifacts,
        runs,
        again,
        writes_of_again,
        unfinished,
        writes_of_unfinished,
        left_running,
        plan,
        changed,
        program.artifacts(),
    )


def _has_checkpoint(storage: Path) -> bool:
    """Returns whether Ray Train has recorded a checkpoint of the sft stage."""
    states = storage.glob("store/sft-*/scratch/checkpoints/checkpoint_manager_snapshot.json")
    return any("checkpoint-" in path.read_text() for path in states)


def names(artifacts: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(manifest["name"] for manifest in artifacts.values())


def of_stage(artifacts: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return next(manifest for manifest in artifacts.values() if manifest["name"] == name)


def test_until_stops_after_the_stage(seen: Seen) -> None:
    assert seen.until.code == 0, seen.until.err
    assert names(seen.artifacts_until) == ["heldout"]


def test_the_recipe_completes_after_two_kills(seen: Seen) -> None:
    assert seen.killed_text.code == seen.killed_training.code == -signal.SIGKILL
    assert seen.complete.code == 0, seen.complete.err
    assert {m["name"]: m["kind"] for m in seen.artifacts.values()} == KINDS


def test_finished_rows_are_not_asked_again_after_a_kill(seen: Seen) -> None:
    before = {entry["id"]: entry["row"] for entry in seen.rows_before}
    entries = seen.program.entries("self_refine", "rows")
    assert 4 <= len(before) < 30
    assert len(entries) == len({entry["id"] for entry in entries}) == 30
    after = {row["id"]: row for row in read_rows(seen, "dialogues")}
    request = {"member", "last", "sample"}  # facts of the request, which the artifact omits
    assert {row_id: after[row_id] for row_id in before} == {
        row_id: {k: v for k, v in row.items() if k not in request} | {"model": "base"}
        for row_id, row in before.items()
    }
    assert of_stage(seen.artifacts, "dialogues")["attempts"] == 2


def test_training_resumes_from_its_checkpoint_after_a_kill(seen: Seen) -> None:
    """Checkpoints are at even steps. A worker may take one more step after the driver dies."""
    assert seen.steps_before[:2] == [1, 2] and seen.steps_before[-1] < 10
    steps = [entry["step"] for entry in seen.program.entries("sft", "steps")]
    assert set(steps) == set(range(1, 11)) and steps[-1] == 10
    resumed_at = [b for a, b in itertools.pairwise(steps) if b != a + 1]
    assert all(step > 1 and step % 2 == 1 for step in resumed_at) and len(resumed_at) <= 1
    assert of_stage(seen.artifacts, "sft")["attempts"] == 2


def test_metrics_of_a_resumed_training_have_every_step_once(seen: Seen) -> None:
    [folder] = seen.program.storage.glob("store/sft-*")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))


def test_losses_after_a_kill_are_those_of_an_uninterrupted_training(
    seen: Seen, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = load(seen.program.recipe, pipeline.KINDS)
    [killed] = seen.program.storage.glob("store/sft-*")
    work = train_once.work_for(tmp_path, tiny_model, read_rows(seen, "clean"))
    work.inputs["clean"], work.seed = work.inputs["data"], recipe.seed
    with in_place_of_ray():
        recipe.stages["sft"].run(work)
    whole, resumed = (
        [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]
        for folder in (work.folder, killed)
    )
    assert len(whole) == 10 and resumed == pytest.approx(whole, abs=1e-4)


def test_every_artifact_is_complete_and_clean(seen: Seen) -> None:
    for folder, manifest in seen.artifacts.items():
        path = seen.program.storage / "store" / folder
        files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
        assert files == {*manifest["files"], "manifest.json"}, folder
        sizes = {name: (path / name).stat().st_size for name in manifest["files"]}
        assert sizes == {name: entry["bytes"] for name, entry in manifest["files"].items()}
        assert manifest["attempts"] >= 1 and manifest["recipe"] == "tiny"


def read_rows(seen: Seen, stage: str) -> list[dict[str, Any]]:
    path = seen.program.storage / "tiny" / "data" / stage / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_flow_from_stage_to_stage(seen: Seen) -> None:
    prompts = read_rows(seen, "grown")
    assert len(prompts) == 30 and len(read_rows(seen, "heldout")) == 8
    for row in read_rows(seen, "feedback"):
        assert sorted(c["model"] for c in row["completions"]) == ["base", "hot"]
        assert all(1 <= c["score"] <= 10 for c in row["completions"])
    pairs = read_rows(seen, "pairs")
    assert len(pairs) == 30
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"]
        assert pair["score_chosen"] >= pair["score_rejected"]
    assert of_stage(seen.artifacts, "dpo")["counts"]["steps"] == 2


def test_dpo_computes_no_log_probability_that_its_reference_has(seen: Seen) -> None:
    assert {row["id"] for row in read_rows(seen, "reference")} == {
        row["id"] for row in read_rows(seen, "pairs")
    }
    assert len(seen.program.entries("reference", "reference")) == 30
    assert not seen.program.entries("dpo", "reference")


def test_log_probabilities_of_choices_are_those_of_transformers(
    seen: Seen, tiny_model: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = read_rows(seen, "knowledge")
    assert [row["choices"] for row in rows] == [choices for _, choices in QUESTIONS]
    for row, (question, choices) in zip(rows, QUESTIONS, strict=True):
        expected = []
        context = len(tokenizer.encode(f"Question: {question}\nAnswer:"))
        for choice in choices:
            ids = tokenizer.encode(f"Question: {question}\nAnswer: {choice}")
            with torch.inference_mode():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(float(logs[range(context - 1, len(ids) - 1), ids[context:]].sum()))
        assert row["models"]["hot"]["log_probabilities"] == pytest.approx(expected, abs=2e-3)
        assert row["models"]["dpo"] != row["models"]["hot"]


def test_the_folder_of_the_run(seen: Seen) -> None:
    view = seen.program.storage / "tiny"
    assert "<html" in (view / "report.html").read_text().lower()
    assert {path.name for path in (view / "models").iterdir()} == {"sft", "dpo"}
    for model in ("sft", "dpo"):
        assert (view / "models" / model / "model.safetensors").is_file()
    data = {name for name, kind in KINDS.items() if kind not in ("sft", "dpo", "report")}
    assert {path.name for path in (view / "data").iterdir()} == data
    for line in ("open", "report", "chat", "MLflow"):
        assert any(printed.startswith(line) for printed in seen.complete.out.splitlines())


def test_the_report_names_models_and_stages(seen: Seen) -> None:
    page = (seen.program.folder / "report.html").read_text()
    for name in ("sft", "dpo", "winrate", "feedback", "dialogues"):
        assert name in page


def test_mlflow_has_one_parent_and_one_run_per_stage(seen: Seen) -> None:
    parents = [run for run in seen.runs if not run["parent"]]
    by_parent = Counter(run["parent"] for run in seen.runs if run["parent"])
    [complete] = [run for run in parents if by_parent[run["id"]] > 1]
    assert complete["status"] == "FINISHED"
    nested = [run for run in seen.runs if run["parent"] == complete["id"]]
    cached = {"heldout"}  # made by the first run, under another MLflow run
    assert sorted(run["name"] for run in nested) == sorted(set(KINDS) - cached)
    assert {run["status"] for run in nested} == {"FINISHED"}
    [sft] = [run for run in nested if run["name"] == "sft"]
    assert {("loss", step) for step in range(1, 11)} <= sft["steps"]


def test_a_resumed_pipeline_continues_its_mlflow_run(seen: Seen) -> None:
    parents = [run["id"] for run in seen.runs if not run["parent"]]
    assert len(parents) == 2  # of the run until heldout, and of the complete one
    assert sorted(parents) == sorted(seen.parents_before)


def test_a_second_run_reuses_everything(seen: Seen) -> None:
    assert seen.again.code == 0, seen.again.err
    assert f"All {len(KINDS)} stages are cached." in seen.again.err
    assert seen.writes_of_again == 0, "MLflow was opened"


def test_runs_left_open_by_a_late_kill_are_closed(seen: Seen) -> None:
    assert seen.unfinished.code == 0, seen.unfinished.err
    assert seen.left_running == []
    assert seen.writes_of_unfinished > 0, "MLflow was not opened"


def test_a_plan_shows_what_must_run_and_why(seen: Seen) -> None:
    assert seen.plan.code == 0
    lines = {line.split()[0]: line for line in seen.plan.out.splitlines() if line.split()}
    assert "to do" in lines["winrate"] and "seed was 0, is 7" in lines["winrate"]
    assert "to do" in lines["report"] and "reads winrate" in lines["report"]
    assert all("cached" in lines[name] for name in KINDS if name not in ("winrate", "report"))


def test_a_changed_setting_runs_its_stage_and_what_reads_it(seen: Seen) -> None:
    assert seen.changed.code == 0, seen.changed.err
    new = {k: m for k, m in seen.artifacts_changed.items() if k not in seen.artifacts}
    assert names(new) == ["report", "winrate"]
    reused = {k: m for k, m in seen.artifacts_changed.items() if k in seen.artifacts}
    assert reused == seen.artifacts
