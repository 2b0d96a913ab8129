"""Tests published answers in AlpacaEval's format: read as completions, and written by an export."""

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import run, run_here, work_on
from test_export import export, make_run, no_network  # noqa: F401

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.export.model_outputs import write_model_outputs
from zephyr_ray.judge import pairwise
from zephyr_ray.judge.pairwise import Pairwise
from zephyr_ray.manifest import Manifest
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, read_jsonl, write_rows
from zephyr_ray.text.outputs import Outputs
from zephyr_ray.text.published import Published

Row = dict[str, Any]


def prompt(row_id: str, text: str) -> Row:
    return {"id": row_id, "prompt": text, "instruction": text, "constraint": None, "source": "t"}


def output(instruction: str, text: str, **more: Any) -> Row:
    generator = more.pop("generator", "gpt4")
    return {"instruction": instruction, "output": text, "generator": generator, **more}


PROMPTS = [
    prompt("p0", "Name a fish."),
    prompt("p1", "Name a bird,\n please."),
    prompt("p2", "So?"),
]
OUTPUTS = [
    output("Name a bird, please. ", "A wren.", dataset="koala"),
    output("Name a fish.", "A cod.", finish_reason="length", tokens=3),
    output("So?", ""),
]


def write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([dict.fromkeys(columns) | row for row in rows])
    parquet.write_table(table, path)


WRITERS = {"a.json": write_json, "a.jsonl": write_jsonl, "b.json": write_jsonl}


def joined(
    folder: Path, outputs: list[Row], prompts: list[Row] = PROMPTS, name: str = "a.json", **s: Any
) -> tuple[list[Row], Work]:
    """Returns the rows and the work of an `outputs` stage."""
    WRITERS.get(name, write_parquet)(folder / name, outputs)
    work = work_on(folder, tasks=prompts)
    stage = Outputs(prompts="tasks", file=name, **s)
    work.files["file"] = folder / name
    work.max_failed = stage.max_failed
    stage.check(work.files, {})
    return run(stage, work), work


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "b.json", "a.parquet"])
def test_answers_are_joined_to_prompts_by_their_text(name: str, tmp_path: Path) -> None:
    rows, work = joined(tmp_path, OUTPUTS, name=name)
    answer = {"model": "gpt4", "principle": None, "system": None, "tokens": None}
    cod = answer | {"text": "A cod.", "finish_reason": "length", "tokens": 3}
    wren, empty = ({**answer, "text": t, "finish_reason": "stop"} for t in ("A wren.", ""))
    assert rows == [
        {**row, "completions": [own]} for row, own in zip(PROMPTS, [cod, wren, empty], strict=True)
    ]
    assert work.counts == {"answers": 3, "made/gpt4": 3, "empty": 1, "rows": 3}


def test_prompts_and_instructions_without_a_partner_are_counted(tmp_path: Path) -> None:
    outputs = [*OUTPUTS[:2], output("Name a tree.", "An elm."), output("Name a fish.", "An eel.")]
    rows, work = joined(tmp_path, outputs)
    assert [row["id"] for row in rows] == ["p0", "p1"]
    assert work.counts == {
        "dropped/no answer in the file": 1,
        "unused/instruction of no prompt": 1,
        "unused/another answer to an instruction": 1,
        **{"answers": 2, "made/gpt4": 2, "rows": 2},
    }
    assert work.examples["dropped/no answer in the file"] == ["So?"]
    assert work.examples["unused/instruction of no prompt"] == ["Name a tree."]
    assert rows[0]["completions"][0]["text"] == "A cod."


def test_prompts_with_the_same_text_get_its_answers_in_order(tmp_path: Path) -> None:
    prompts = [prompt(f"p{number}", "Name a fish.") for number in range(3)]
    outputs = [output("Name a fish.", text) for text in ("A cod.", "An eel.")]
    rows, work = joined(tmp_path, outputs, prompts)
    texts = [row["completions"][0]["text"] for row in rows]
    assert texts == ["A cod.", "An eel.", "An eel."]
    assert not any(name.startswith("unused") for name in work.counts)


def test_too_many_prompts_without_an_answer_stop_the_stage(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=r"2 of 3 rows were dropped .*'no answer in the file': So"):
        joined(tmp_path, OUTPUTS[1:2], [PROMPTS[0], PROMPTS[2], PROMPTS[1]])


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=r"no prompt of 'tasks' .* such as 'Name a tree.'"):
        joined(tmp_path, [output("Name a tree.", "An elm.")])


def test_prompts_with_an_added_constraint_name_the_setting(tmp_path: Path) -> None:
    asked = {**prompt("p0", "Name a fish. Use capitals."), "instruction": "Name a fish."}
    with pytest.raises(Permanent, match="with a constraint added; set constrained: 0"):
        joined(tmp_path, OUTPUTS[1:2], [asked])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "is not JSON; correct it"),
        ("[]", "has no answers"),
        ('["Name a fish."]', "example 1: not a JSON object"),
        ('{"Name a fish.": "Cod."}', 'line 1: "instruction" is not a text'),
        (json.dumps([OUTPUTS[0], output("", "Cod.")]), 'example 2: "instruction" is not a text'),
        (json.dumps([output("Name a fish.", None)]), 'example 1: "output" is not a text'),  # type: ignore[arg-type]
        (
            json.dumps([output("So?", "Cod.", generator=" ")]),
            'example 1: "generator" is not a text',
        ),
        (
            json.dumps([OUTPUTS[0], output("So?", "Cod.", generator="llama")]),
            "example 2: the generator is 'llama', but 'gpt4' in the rows before it",
        ),
    ],
)
def test_a_file_in_another_format_is_one_line_before_any_work(
    text: str, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Permanent) as error:
        Outputs(prompts="tasks", file="a.json").check({"file": tmp_path / "a.json"}, {})
    assert fault in str(error.value)


def test_a_file_of_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=r"a\.csv is not a \.json, \.jsonl or \.parquet file"):
        Outputs(prompts="tasks", file="a.csv").check({"file": tmp_path / "a.csv"}, {})


def artifact(folder: Path, name: str, rows: list[Row]) -> Artifact:
    (folder / name).mkdir()
    write_rows(folder / name, rows)
    return Artifact(folder / name, Manifest(kind="text", key=name, files={}))


def answered(model: str, *texts: str) -> list[Row]:
    answers = ({"model": model, "text": t, "finish_reason": "stop", "tokens": 2} for t in texts)
    return [{**p, "completions": [a]} for p, a in zip(PROMPTS, answers, strict=True)]


def compare(folder: Path, ours: str, monkeypatch: pytest.MonkeyPatch) -> Row:
    """Compares a model with the published answers, and returns the content of result.json."""
    run_here(monkeypatch, pairwise)
    rows, _ = joined(folder, OUTPUTS)
    inputs = {
        "answers": artifact(folder, "answers", answered(ours, "Cod.", "Wren.", "So.")),
        "published": artifact(folder, "published", rows),
    }
    models = {"judge": Model("judge", RulesSettings())}
    work = Work("winrate", folder / "winrate", 0, inputs, models, {})
    work.folder.mkdir()
    Pairwise(judge="judge", answers=["answers"], baseline="published").run(work)
    return json.loads((work.folder / "result.json").read_text())


def test_a_published_model_is_a_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compare(tmp_path, "sft", monkeypatch)
    assert made["baseline"] == "gpt4"
    # The published answers are truncated, complete and empty.
    sft = made["models"]["sft"]
    assert (sft["wins"], sft["ties"], sft["losses"]) == (2, 1, 0)


def test_stages_with_answers_of_the_same_model_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Permanent, match="'answers' and 'published' both have answers of 'gpt4'"):
        compare(tmp_path, "gpt4", monkeypatch)


def test_the_instructions_of_a_file_are_prompts(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", OUTPUTS)
    stage = Published(
        makes="prompts",
        files="a.json",
        columns={"prompt": "instruction", "source": "dataset"},
    )
    work = work_on(tmp_path)
    work.files["files"] = tmp_path / "a.json"
    stage.check(work.files, {})
    rows = run(stage, work)
    assert [row["prompt"] for row in rows] == [row["instruction"] for row in OUTPUTS]
    assert [row["source"] for row in rows] == ["koala", "published", "published"]


RECIPE = """
name: small
models:
  base: {weights: me/base}
stages:
  tasks: {kind: prompts, seeds: tasks.jsonl}
  answers: {kind: completions, models: [base], prompts: tasks, per_prompt: 2}
"""


def test_an_exported_stage_is_read_back_as_the_same_completions(tmp_path: Path) -> None:
    rows = [
        {**p, "completions": [{**own, "principle": None, "system": None}]}
        for p, own in zip(
            PROMPTS,
            [
                {"model": "base", "text": "A cod “or” two.", "finish_reason": "stop", "tokens": 5},
                {"model": "base", "text": "A wren\nor", "finish_reason": "length", "tokens": 512},
                {"model": "base", "text": "", "finish_reason": "stop", "tokens": 1},
            ],
            strict=True,
        )
    ]
    folder = export(make_run(tmp_path, RECIPE, rows={"answers": rows}), "answers")
    read, _ = joined(tmp_path, json.loads((folder / "model_outputs.json").read_text()))
    assert read == rows
    assert "in AlpacaEval's format" in (folder / "README.md").read_text()
    assert list(read_jsonl(next((folder / "data").iterdir()))) == rows


def test_each_model_of_a_pool_has_a_file_with_its_first_answers(tmp_path: Path) -> None:
    rows = [
        {**PROMPTS[0], "completions": [{"model": m, "text": t} for m, t in answers]}
        for answers in ([("a/b", "1"), ("a", "2"), ("a/b", "3")], [("a b", "4"), ("a", "5")])
    ]
    write_model_outputs(artifact(tmp_path, "answers", rows), tmp_path)
    written = {
        path.name: [(row["generator"], row["output"]) for row in json.loads(path.read_text())]
        for path in (tmp_path / "model_outputs").iterdir()
    }
    assert written == {
        "a-b.json": [("a/b", "1")],
        "a.json": [("a", "2"), ("a", "5")],
        "a-b-2.json": [("a b", "4")],
    }
