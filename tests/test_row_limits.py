"""Tests the limit on useless, failed and dropped rows, and how a stage reports them."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from in_process import Scripted, run_here, work_on

from zephyr_ray import model_pool, rows
from zephyr_ray.display import summarize
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.manifest import Manifest
from zephyr_ray.models.contract import Reply
from zephyr_ray.outcomes import (
    Answered,
    EnvironmentFault,
    Notice,
    Outcome,
    RowFault,
    from_entry,
    to_entry,
)
from zephyr_ray.row_actor import RowActor
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, Journal
from zephyr_ray.text import cleaning, feedback
from zephyr_ray.text.cleaning import Clean
from zephyr_ray.text.completions import Completions
from zephyr_ray.text.dialogues import SelfRefine
from zephyr_ray.text.feedback import Feedback

MODELS = [Model("m", RulesSettings())]


def empty(row: dict[str, Any]) -> RowError | None:
    return None if row["text"] else RowError("the answer is empty", "empty")


def row(number: int, text: str = "") -> Answered:
    return Answered(str(number), {"id": str(number), "text": text})


def run(
    work: Work, monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome], count: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs `count` rows in an attempt with these outcomes. Returns results and ids of rows run."""
    asked: list[str] = []

    def execute(_: Work, recorded: Any, pending: list[Any], *__: Any) -> None:
        asked.extend(row["id"] for row in pending)
        journal = work.journal("rows", f"attempt{len(list(work.scratch.glob('rows/*')))}")
        for outcome in outcomes:
            journal.append(to_entry(outcome))
        recorded.follow()

    monkeypatch.setattr(rows, "_execute", execute)
    ids = [{"id": str(number)} for number in range(count)]
    return rows.run_rows(work, ids, None, MODELS, empty), asked  # type: ignore[arg-type]


def test_models_with_equal_engines_actors_and_rows_in_flight_share_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(_: Work, recorded: Any, pending: list[Any], __: Any, members: list[Model]) -> None:
        passes.append([model.name for model in members])
        recorded.results |= {row["id"]: row for row in pending}

    passes: list[list[str]] = []
    monkeypatch.setattr(rows, "_execute", execute)
    more: dict[str, dict[str, Any]] = {"b": {"concurrency": 2}, "c": {}, "d": {"actors": 3}}
    models = [*MODELS, *(Model(name, RulesSettings(**how)) for name, how in more.items())]
    asked = [{"id": model.name, "member": model.name} for model in models]
    rows.run_rows(work_on(tmp_path), asked, None, models)  # type: ignore[arg-type]
    assert passes == [["m", "c"], ["b"], ["d"]]


def test_useless_results_within_the_limit_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Outcome] = [row(n, "" if n < 2 else "text") for n in range(40)]
    results, _ = run(work_on(tmp_path), monkeypatch, outcomes, 40)
    assert [result["text"] for result in results] == ["", "", *["text"] * 38]


def test_useless_results_and_failed_rows_have_one_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 40 rows may fail."""
    failed: list[Outcome] = [row(0), row(1), RowFault("2", "9 tokens", "too long")]
    sound: list[Outcome] = [row(n, "text") for n in range(3, 40)]
    with pytest.raises(Permanent) as raised:
        run(work_on(tmp_path), monkeypatch, failed + sound, 40)
    line = str(raised.value)
    assert "3 of 40 rows failed (8%: empty 2, too long 1), max_failed allows 2; " in line
    assert "row '0': the answer is empty" in line and "row '2': 9 tokens" in line
    assert "raise stage.max_failed to go on without them" in line


def test_a_stage_without_a_useful_result_stops_at_any_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_on(tmp_path)
    work.max_failed = 1
    with pytest.raises(Permanent, match="^every row failed; the first: the answer is empty; "):
        run(work, monkeypatch, [row(0), row(1)], 2)


def test_useless_results_above_the_limit_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, sound = work_on(tmp_path), [row(n, "text") for n in range(2, 20)]
    with pytest.raises(Permanent, match="2 of 20 rows failed"):
        run(work, monkeypatch, [row(0), row(1), *sound], 20)
    results, asked = run(work, monkeypatch, [row(0, "new"), row(1, "new")], 20)
    assert asked == ["0", "1"]
    assert [result["text"] for result in results[:3]] == ["new", "new", "text"]
    assert run(work, monkeypatch, [], 20) == (results, [])


def test_useless_results_of_a_row_are_counted_over_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count makes a retry a new request; the answer log would repeat the useless answer."""
    work = work_on(tmp_path)
    for _ in range(2):
        with pytest.raises(Permanent, match="every row failed"):
            run(work, monkeypatch, [row(0), row(1)], 2)
    outcomes = rows._Outcomes(work.journal("rows"), rows=2, flaw=empty)
    outcomes.follow()
    outcomes.prepare_retry()
    assert outcomes.useless == {"0": 2, "1": 2} and not outcomes.results


def act(folder: Path, program: Any, count: int, **arguments: Any) -> list[Outcome | None]:
    import asyncio

    model = Model("m", RulesSettings(concurrency=1))
    actor = RowActor(program, {"m": model}, 0, str(folder), max_failed=1, **arguments)
    try:
        asyncio.run(actor({"row": [json.dumps({"id": str(n)}) for n in range(count)]}))
    finally:
        rows.log.handlers[:] = []
    return [from_entry(entry) for entry in Journal(folder).read_new()]


def test_an_actor_stops_once_too_many_results_are_useless(tmp_path: Path) -> None:
    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        return row | {"text": ""}

    assert len(act(tmp_path, program, 50, flaw=empty)) == 2


def test_warnings_of_an_actor_reach_the_journal_without_tracebacks(tmp_path: Path) -> None:
    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        rows.log.info("not this")
        rows.log.warning("%s is busy; retrying", "peer")
        rows.console.warning("stage: a notice that was already shown")
        raise KeyError("text")

    assert act(tmp_path, program, 1) == [
        Notice("peer is busy; retrying"),
        EnvironmentFault("0", "KeyError: 'text'"),
    ]


def test_a_notice_is_for_the_attempt_that_wrote_it(tmp_path: Path) -> None:
    work = work_on(tmp_path)
    journal = work.journal("rows", "earlier")
    journal.append(to_entry(Notice("busy")))
    outcomes = rows._Outcomes(work.journal("rows"))
    outcomes.follow()
    assert outcomes.notices == ["busy"]
    outcomes.prepare_retry()
    assert outcomes.notices == []


def test_a_row_that_stays_unanswered_can_be_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting that the error line names drops the row."""
    work, odd = work_on(tmp_path), EnvironmentFault("0", "status 400: something odd")
    sound: list[Outcome] = [row(n, "text") for n in range(1, 20)]
    with pytest.raises(Permanent) as raised:
        run(work, monkeypatch, [odd, *sound], 20)
    line = str(raised.value)
    assert "1 row was not answered (row '0': status 400: something odd)" in line
    [setting] = shlex.split(line.partition("--set ")[2])
    name, _, value = setting.partition("=")
    assert name == "stage.give_up"
    work.give_up = yaml.safe_load(value)
    results, asked = run(work, monkeypatch, [], 20)
    assert asked == [] and len(results) == 19
    assert (work.counts["failed/rows"], work.counts["failed/given up"]) == (1, 1)


def test_several_unanswered_rows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[Outcome] = [EnvironmentFault(str(n), "odd") for n in range(2)]
    with pytest.raises(Permanent, match=r"2 rows were not answered .* drop those rows with") as e:
        run(work_on(tmp_path), monkeypatch, [*faults, row(2, "text")], 3)
    assert """'stage.give_up=["0", "1"]'""" in str(e.value)


def test_rows_given_up_count_against_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_on(tmp_path)
    work.give_up = ["0", "1"]
    with pytest.raises(Permanent, match=r"2 of 20 rows failed \(10%: given up 2\)"):
        run(work, monkeypatch, [row(n, "text") for n in range(2, 20)], 20)


# Results that a stage counts as useless


def engine(*answers: str | Reply) -> SimpleNamespace:
    ask: Any = Scripted(*answers)
    ask.judge = lambda form, row, sides: _judge(form, ask)
    return SimpleNamespace(ask_for=lambda model, row: ask)


async def _judge(form: str, ask: Any) -> dict[str, Any]:
    reply = await ask([], max_tokens=1)
    score = float(reply.text) if reply.text[:1].isdigit() else None
    return {"score": score, "reason": f"unparsable: {reply.text!r}", "checks": {}}


def prompts(count: int) -> list[dict[str, Any]]:
    names = {"instruction": "Name a fish.", "prompt": "Name a fish.", "constraint": None}
    return [{"id": f"p{n}", **names} for n in range(count)]


def test_empty_answers_are_useless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = engine("Eel.", Reply(" \u200b", "length"), Reply("", "stop"))
    faults = run_here(monkeypatch, model_pool, answers)
    work = work_on(tmp_path, prompts=prompts(3))
    work.models = {"m": MODELS[0]}
    Completions(models=["m"], prompts="prompts", max_tokens=24).run(work)
    assert [str(fault) for fault in faults] == [
        "the answer is empty: max_tokens (24) was used up before any text, perhaps by reasoning; "
        "raise max_tokens",
        "the answer is empty",
    ]
    assert (work.counts["answers"], work.counts["empty"], work.counts["truncated"]) == (3, 2, 1)


def test_a_dialogue_that_begins_with_an_empty_answer_is_useless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = engine("", "Why?", "Eel.", "Cod.", "Why?", "")
    faults = run_here(monkeypatch, model_pool, answers)
    work = work_on(tmp_path, prompts=prompts(2))
    work.models = {"m": MODELS[0]}
    SelfRefine(model="m", prompts="prompts", turns=2).run(work)
    assert [str(fault) for fault in faults] == ["the answer is empty"]
    assert (work.counts["answers"], work.counts["empty"]) == (4, 2)


def test_unparsable_scores_are_useless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = run_here(monkeypatch, feedback, engine("7", "no idea"))
    answers = [{"model": "m", "text": text, "finish_reason": "stop"} for text in ("Eel.", "Cod.")]
    work = work_on(tmp_path, answers=[row | {"completions": answers} for row in prompts(1)])
    work.models = {"judge": MODELS[0]}
    Feedback(judge="judge", completions="answers").run(work)
    assert [(str(fault), fault.cause) for fault in faults] == [
        ("unparsable: 'no idea'", "unparsable")
    ]


def test_unparsable_scores_of_dialogues_are_useless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = run_here(monkeypatch, cleaning, engine("10", "no idea"))
    talks = [
        {
            "id": answer,
            "constraint": None,
            "messages": [
                {"role": "user", "content": f"Name {answer}."},
                {"role": "assistant", "content": answer, "finish_reason": "stop"},
            ],
        }
        for answer in ("Eel.", "Cod.")
    ]
    work = work_on(tmp_path, talks=talks)
    work.models = {"judge": MODELS[0]}
    Clean(dialogues="talks", judge="judge").run(work)
    assert [fault.cause for fault in faults] == ["unparsable"]


# Rows that a stage drops itself


def dropping(folder: Path, **rules: int) -> Work:
    work = work_on(folder)
    for rule, count in rules.items():
        for number in range(count):
            work.drop(rule, f"{rule}{number}")
    return work


def test_dropped_rows_have_a_limit(tmp_path: Path) -> None:
    dropping(tmp_path, bad=5).check_dropped(100)
    (tmp_path / "more").mkdir()
    with pytest.raises(Permanent) as raised:
        dropping(tmp_path / "more", odd=1, bad=5).check_dropped(100)
    assert str(raised.value) == (
        "stage 'stage': 6 of 100 rows were dropped (6%: bad 5, odd 1), max_failed allows 5; the "
        "first row dropped as 'bad': bad0; correct the rows, or raise stage.max_failed to go on "
        "without them"
    )


def test_sound_rows_are_dropped_without_a_limit(tmp_path: Path) -> None:
    dropping(tmp_path, tie=90, bad=5).check_dropped(100, sound=["tie"])


def test_the_last_line_says_what_is_missing_and_why() -> None:
    counts = {
        "rows": 5,
        "steps": 3,
        "failed/rows": 3,
        "failed/too long": 1,
        "failed/content filter": 2,
        "dropped/unknown role": 95,
        "dropped/no answer": 2,
        "dropped dialogues": 1,
        "truncated": 4,
        "unparsable": 0,
        "empty": 2,
    }
    manifest = Manifest(kind="sft", key="k", files={}, counts=counts, seconds=12)
    assert summarize(Artifact(Path(), manifest)) == (
        "5 rows · 3 steps · 3 failed (content filter 2, too long 1) · "
        "97 dropped (unknown role 95, no answer 2) · 4 truncated · 2 empty · 12 s"
    )
    manifest = Manifest(kind="sft", key="k", files={}, counts={"rows": 5, "failed/rows": 0})
    assert summarize(Artifact(Path(), manifest)).startswith("5 rows · ")
