"""Tests how rows are shared among a pool of models, and what adding a model to it changes."""

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import run, run_here, work_on

from zephyr_ray import model_pool, rows
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.messages import Message
from zephyr_ray.model_pool import rank
from zephyr_ray.models.contract import Reply
from zephyr_ray.outcomes import Answered, RowFault, to_entry
from zephyr_ray.settings import typed
from zephyr_ray.stage import Stage, Work
from zephyr_ray.text import feedback
from zephyr_ray.text.completions import Completions
from zephyr_ray.text.dialogues import SelfRefine
from zephyr_ray.text.feedback import Feedback
from zephyr_ray.text.prompts import SelfInstruct

PROMPTS = [
    {
        "id": f"p{n}",
        "instruction": f"Name pet {n}.",
        "prompt": f"Name pet {n}. Be short.",
        "constraint": None,
        "source": "ultrachat",
    }
    for n in range(40)
]
NAMES = st.lists(st.text(max_size=4), min_size=1, max_size=6, unique=True)


class Models:
    """Models that answer with their name, unless the prompt is too long for them; `requests` holds
    what each was asked."""

    def __init__(self, too_long: str = "", cause: str = "too long"):
        self._too_long, self._cause = too_long, cause
        self.requests: list[tuple[str, str, str]] = []

    def ask_for(self, model: Model, row: dict[str, Any]) -> Any:
        async def ask(messages: list[Message], *, max_tokens: int, **settings: Any) -> Reply:
            self.requests.append((model.name, str(row["sample"]), str(messages)))
            if model.name in self._too_long:
                raise RowError(f"does not fit {model.name}", self._cause)
            words = " ".join(f"{w}{len(self.requests)}{model.name}" for w in "xyz")
            return Reply(f"9. Explain {words}", "stop")

        return ask


def made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, models: Models, stage: Stage, names: str
) -> tuple[list[dict[str, Any]], Work]:
    folder.mkdir(exist_ok=True)
    run_here(monkeypatch, model_pool, models)
    work = work_on(folder, prompts=PROMPTS)
    (folder / "seeds.jsonl").write_text('{"id": "t1", "instruction": "Name one fish."}\n')
    work.files = {"seeds": folder / "seeds.jsonl"}
    work.models = {name: Model(name, VllmSettings(weights="w")) for name in names}
    return run(stage, work), work


def completions(names: str, **settings: Any) -> Completions:
    return Completions(models=list(names), prompts="prompts", **settings)


@settings(deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 9), text=st.text(), names=NAMES, added=st.text(max_size=4))
def test_a_new_model_keeps_the_order_of_the_others(
    seed: int, text: str, names: list[str], added: str
) -> None:
    before, after = rank(seed, text, names), rank(seed, text, [added, *names])
    assert sorted(before) == sorted(names)
    assert [name for name in after if name != added or name in names] == before


def test_models_get_equal_shares_of_the_texts() -> None:
    names = [f"m{n}" for n in range(17)]
    texts = 4000
    counts = Counter(n for i in range(texts) for n in rank(0, f"text {i}", names)[:4])
    # Expected: 941 ± 5 standard deviations of sqrt(4000 · 4/17 · 13/17) = 27.
    assert all(806 < counts[name] < 1076 for name in names)
    firsts = Counter(rank(0, f"text {i}", "ab")[0] for i in range(texts))
    assert 1842 < firsts["a"] < 2158  # 2000 ± 5 standard deviations of 32
    assert rank(0, "text", "abcdef") != rank(1, "text", "abcdef")


@pytest.mark.parametrize("settings", [{"per_prompt": 2}, {"per_prompt": 2, "principles": True}, {}])
def test_adding_a_model_asks_only_that_model(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = Models(), Models()
    made(tmp_path / "a", monkeypatch, before, completions("abc", **settings), "abc")
    rows, _ = made(tmp_path / "b", monkeypatch, after, completions("xbac", **settings), "xbac")
    asked_again = set(after.requests) - set(before.requests)
    assert {model for model, _, _ in asked_again} == {"x"}
    drawn = {c["model"] for row in rows for c in row["completions"]}
    assert drawn == set("abcx")


def test_only_the_answers_of_a_new_model_are_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(models: str) -> set[tuple[Any, ...]]:
        requests = set()

        def ask_for(model: Model, row: dict[str, Any]) -> Any:
            async def judge(form: str, row: dict[str, Any], answers: list[Any]) -> dict[str, Any]:
                # "sample" tells requests with the same messages apart.
                requests.add((row["sample"], form, row["prompt"], answers[0]["text"]))
                return {"score": 5.0, "reason": "", "checks": {}}

            return SimpleNamespace(judge=judge)

        run_here(monkeypatch, feedback, SimpleNamespace(ask_for=ask_for))
        answers = [{"model": m, "text": f"by {m}", "finish_reason": "stop"} for m in models]
        folder = tmp_path / models
        folder.mkdir()
        work = work_on(folder, answers=[{**PROMPTS[0], "completions": answers}])
        work.models = {"judge": Model("judge", VllmSettings(weights="w"))}
        run(Feedback(judge="judge", completions="answers"), work)
        return requests

    assert {text for *_, text in judged("xab") - judged("ab")} == {"by x"}


def test_equal_prompts_are_different_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = [PROMPTS[0], {**PROMPTS[0], "id": "other"}, PROMPTS[1]]
    monkeypatch.setitem(globals(), "PROMPTS", twice)
    models = Models()
    made(tmp_path, monkeypatch, models, completions("a", per_prompt=2), "a")
    assert [sample for _, sample, _ in models.requests] == [
        *("[0, 0]", "[0, 1]"),
        *("[1, 0]", "[1, 1]"),
        *("[0, 0]", "[0, 1]"),
    ]


def test_a_prompt_too_long_for_a_model_goes_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = completions("abcd", per_prompt=2)
    usual, _ = made(tmp_path / "a", monkeypatch, Models(), stage, "abcd")
    rows, work = made(tmp_path / "b", monkeypatch, Models("ad"), stage, "abcd")
    lost = Counter[str]()
    for row, before in zip(rows, usual, strict=True):
        order = rank(0, row["prompt"], "abcd")
        assert [c["model"] for c in before["completions"]] == order[:2]
        fit = [name for name in order if name in "bc"]
        assert [c["model"] for c in row["completions"]] == fit
        # Models up to the last one asked; the others were not needed.
        tried = order[: order.index(fit[-1])]
        lost.update(unfit := [name for name in tried if name in "ad"])
        for completion in row["completions"]:
            moved = completion["model"] not in order[:2]
            assert sorted(completion.get("too_long_for", [])) == (sorted(unfit) if moved else [])
    assert lost and {k: v for k, v in work.counts.items() if "too long" in k} == {
        f"too long/{name}": count for name, count in lost.items()
    }
    assert work.counts["answers"] == 80
    assert work.examples["too long/a"][0].endswith(": does not fit a")


def test_a_model_answers_again_if_no_other_one_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models("a")
    rows, _ = made(tmp_path, monkeypatch, models, completions("ab", per_prompt=3), "ab")
    assert [[c["model"] for c in row["completions"]] for row in rows] == [["b"] * 3] * 40
    samples = {sample for model, sample, _ in models.requests if model == "b"}
    assert samples == {"[0, 0]", "[0, 1]", "[0, 2]"}


def with_journal(monkeypatch: pytest.MonkeyPatch, models: Models) -> list[str]:
    """Replaces the pass over rows that share an engine with a loop in this process, which writes to
    the journal. Returns the names of the models of each pass."""
    passes: list[str] = []

    def execute(
        work: Work, outcomes: Any, pending: list[Any], program: Any, own: list[Model]
    ) -> None:
        by_name = {model.name: model for model in own}
        passes.append("".join(by_name))
        journal = work.journal("rows", f"pass{len(passes)}")
        for row in pending:
            ask = models.ask_for(by_name[row["member"]], row)
            try:
                outcome: Any = Answered(row["id"], asyncio.run(program(row, ask)))
            except RowError as error:
                outcome = RowFault(row["id"], str(error), error.cause)
            journal.append(to_entry(outcome))
        outcomes.follow()

    monkeypatch.setattr(rows, "_execute", execute)
    return passes


def work_for(folder: Path, *models: Model) -> Work:
    work = work_on(folder, prompts=PROMPTS)
    work.models = {model.name: model for model in models}
    return work


def test_models_take_turns_and_those_of_one_engine_share_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"a": "x", "b": "y", "c": "x", "d": "z"}
    work = work_for(tmp_path, *(Model(n, VllmSettings(weights=w)) for n, w in weights.items()))
    passes = with_journal(monkeypatch, Models("d"))
    written = run(completions("abcd", per_prompt=2), work)
    assert passes == ["ac", "b", "d", "ac", "b"]  # again for prompts that were too long for d
    assert {len(row["completions"]) for row in written} == {2}
    asked = passes.copy()
    assert run(completions("abcd", per_prompt=2), work) == written
    assert passes == asked


def test_a_prompt_too_long_for_all_models_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_for(tmp_path, *(Model(n, VllmSettings(weights=n)) for n in "ab"))
    with_journal(monkeypatch, Models("ab"))
    with pytest.raises(Permanent, match=r"rows failed .*too long .*does not fit"):
        run(completions("ab", per_prompt=2), work)
    work.max_failed = 1
    assert run(completions("ab", per_prompt=2), work) == []
    assert (work.counts["failed/rows"], work.counts["failed/too long"]) == (80, 80)
    assert (work.counts["too long/a"], work.counts["too long/b"]) == (40, 40)


def test_a_row_with_another_fault_stays_with_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_for(tmp_path, *(Model(n, VllmSettings(weights=n)) for n in "ab"))
    work.max_failed = 1
    with_journal(monkeypatch, models := Models("a", "content filter"))
    written = run(completions("ab", per_prompt=1), work)
    assert {c["model"] for row in written for c in row["completions"]} == {"b"}
    assert len(models.requests) == len(PROMPTS)
    assert work.counts["failed/content filter"] == len(PROMPTS) - len(written) > 0


def test_each_dialogue_has_one_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dialogues(folder: str, names: str, too_long: str = "") -> tuple[list[Any], Work]:
        stage = SelfRefine(model=list(names), prompts="prompts", turns=2)
        return made(tmp_path / folder, monkeypatch, Models(too_long), stage, names)

    rows, work = dialogues("a", "ab")
    assert [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    for row in rows:
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert len(answers) == 2 and all(text.endswith(row["model"]) for text in answers)
    teachers = Counter(row["model"] for row in rows)
    assert len(teachers) == 2
    assert {k: v for k, v in work.counts.items() if "made" in k} == {
        f"made/{name}": count for name, count in teachers.items()
    }
    more, _ = dialogues("b", "abc")
    pairs = zip(rows, more, strict=True)
    assert {new["model"] for old, new in pairs if new["model"] != old["model"]} == {"c"}
    moved, work = dialogues("c", "ab", too_long="a")
    assert {row["model"] for row in moved} == {"b"}
    assert work.counts["too long/a"] == teachers["a"]
    assert [row.get("too_long_for") for row in moved] == [
        ["a"] if row["model"] == "a" else None for row in rows
    ]


def test_new_tasks_name_their_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = SelfInstruct(model=["a", "b"], seeds="seeds.jsonl", count=20)
    rows, work = made(tmp_path, monkeypatch, Models(), stage, "ab")
    new = [row for row in rows if row["source"] == "generated"]
    assert new and all(row["instruction"].strip(".").endswith(row["author"]) for row in new)
    teachers = Counter(row["author"] for row in new)
    assert {name: work.counts[f"made/{name}"] for name in "ab"} == teachers
    assert ["author" in row for row in rows] == [row["source"] != "t1" for row in rows]


def test_one_model_keeps_the_row_ids_of_earlier_versions(tmp_path: Path) -> None:
    work = work_on(tmp_path, prompts=PROMPTS[:1])
    work.models = {"m": Model("m", VllmSettings(weights="w"))}
    answer = {"model": "m", "system": None, "text": "A cat.", "finish_reason": "stop", "tokens": 3}
    for number in range(2):
        entry = {"id": f"p0/{number}", "row": {"id": f"p0/{number}", **answer}}
        work.journal("rows", "worker").append(entry)
    [row] = run(completions("m", per_prompt=2), work)
    assert row["completions"] == [answer, answer]


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ([], "is empty; name a model"),
        (["a", "a"], "names a model twice"),
        (3, "must be the name of a model, or a list of names"),
        (["a", 3], "must be the name of a model, or a list of names"),
    ],
)
def test_a_pool_of_teachers_is_checked(model: Any, error: str) -> None:
    with pytest.raises(Permanent, match=f"here: setting 'model': {error}"):
        typed(SelfRefine, {"model": model, "prompts": "prompts"}, "here")
