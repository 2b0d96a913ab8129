"""Runs the stages of two-turn questions against an endpoint, and reads their report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import GOOD, Answer, completion, endpoint
from in_process import run, run_here, work_on

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.errors import Permanent
from zephyr_ray.judge import mt_bench, mt_bench_answers
from zephyr_ray.judge.mt_bench import MtBench
from zephyr_ray.judge.mt_bench_answers import MtBenchAnswers
from zephyr_ray.judge.mt_bench_questions import SHIPPED, TEMPERATURES, read_questions
from zephyr_ray.judge.mt_bench_section import mt_bench_section
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.preflight import check_files, check_settings, preflight
from zephyr_ray.recipe import load
from zephyr_ray.section import Bars, Interval, Pair, Radar, Sample, Table, Trend
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, Store

Body = dict[str, Any]
Run = tuple[list[Body], Work, Artifact]
MODELS = ("sft", "dpo")


def models(url: str, *names: str) -> dict[str, Model]:
    settings = {n: OpenAISettings(model=n, base_url=url, temperature=0.5) for n in names}
    return {name: Model(name, given) for name, given in settings.items()}


def play(folder: Path, questions: int, judge: Callable[[str], str], **settings: Any) -> Run:
    """Runs both stages on the first shipped questions, against an endpoint whose models answer with
    their name and whose judge replies with `judge(question)`. Returns the requests, and the second
    stage's work and artifact."""

    def reply(_: int, body: Body) -> Answer:
        question = body["messages"][-1]["content"]
        answer = judge(question) if body["model"] == "judge" else f"By {body['model']}."
        return Answer(200, completion(answer))

    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    file = folder / "questions.jsonl"
    file.write_text("\n".join(lines[:questions]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch, endpoint(reply) as server:
        for module in (mt_bench, mt_bench_answers):
            run_here(monkeypatch, module)
        first, second = folder / "first", folder / "second"
        first.mkdir()
        second.mkdir()
        answers = MtBenchAnswers(models=list(MODELS), questions=file.name)
        work = work_on(first)
        work.files = {"questions": file}
        work.models = models(server.url, *MODELS)
        rows = run(answers, work)
        work = work_on(second, answers=rows)
        work.models, work.stages = models(server.url, "judge"), {"answers": answers}
        run(MtBench(judge="judge", answers=["answers"], **settings), work)
        manifest = Manifest(kind="mt_bench", key="0", files={}, counts=work.counts)
        return server.bodies, work, Artifact(work.folder, manifest)


def score(question: str) -> str:
    """Returns 8 for answers of dpo and 6 for those of sft."""
    return f"Rating: [[{8 if question.rsplit('By ', 1)[1].startswith('dpo') else 6}]]"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns a run of all shipped questions."""
    return play(tmp_path_factory.mktemp("scored"), 16, score)


@pytest.fixture
def intact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets artifacts without hashes be read."""
    monkeypatch.setattr(Artifact, "file", lambda self, name: self.folder / name)


def test_an_endpoint_is_asked_at_the_temperature_of_each_category(scored: Run) -> None:
    bodies, _, _ = scored
    by_question = {q["turns"][0]: q["category"] for q in read_questions(SHIPPED)}
    asked = [body for body in bodies if body["model"] in MODELS]
    assert len(asked) == 2 * 16 * 2
    for body in asked:
        category = by_question[body["messages"][0]["content"]]
        assert body["temperature"] == TEMPERATURES[category]
    judged = [body for body in bodies if body["model"] == "judge"]
    assert len(judged) == 2 * 16 * 2
    assert all(body["temperature"] == 0.5 for body in judged)
    # The judge replies in MT-Bench's format, so no JSON schema is sent.
    assert not any("response_format" in body for body in judged)
    assert sum("The right solution:" in b["messages"][0]["content"] for b in judged) == 2 * 6 * 2


def test_scores_of_two_models(scored: Run, intact: None) -> None:
    _, work, artifact = scored
    assert work.counts == {
        **{"unparsable": 0, "missing": 0, "mt_bench/sft": 6.0, "mt_bench/dpo": 8.0, "rows": 16},
    }
    result = json.loads((artifact.folder / "result.json").read_text())
    assert [(d["a"], d["b"], d["mean"]) for d in result["differences"]] == [("dpo", "sft", 2.0)]
    section = mt_bench_section(artifact)
    assert section.headline == (
        "dpo has a score of 8.00 [8.00, 8.00] out of 10 on 16 two-turn questions; "
        "against sft: +2.00 [+2.00, +2.00]."
    )
    blocks = section.chapters[0].blocks
    [radar] = [block for block in blocks if isinstance(block, Radar)]
    assert radar.axes == tuple(TEMPERATURES)
    assert radar.series == (("sft", (6.0,) * 8), ("dpo", (8.0,) * 8))
    [trend] = [block for block in blocks if isinstance(block, Trend)]
    assert trend.series[1] == (
        "dpo",
        (("first turn", Interval(8, 8, 8)), ("second turn", Interval(8, 8, 8))),
    )
    *_, differences = [block for block in blocks if isinstance(block, Table)]
    assert differences.rows == ((Pair("dpo", "sft"), Interval(2, 2, 2)),)
    samples = [block for block in section.chapters[1].blocks if isinstance(block, Sample)]
    assert [a.model for a in samples[0].answers] == ["sft", "dpo"]
    assert samples[0].answers[1].facts == ("turn 1: score 8.0", "turn 2: score 8.0")
    assert samples[0].kind in TEMPERATURES


def test_unreadable_judgements_are_requested_again_and_counted(
    tmp_path: Path, intact: None
) -> None:
    def reply(question: str) -> str:
        if question.startswith("Your reply cannot be read"):
            return "I rate it highly."
        return (
            "I rate it." if "lighthouse" in question and "By dpo" in question else score(question)
        )

    bodies, work, artifact = play(tmp_path, 4, reply)
    assert (work.counts["unparsable"], work.counts["unparsable_at_first"]) == (2, 2)
    assert work.counts["mt_bench/dpo"] == 8.0
    again = [b for b in bodies if "cannot be read" in b["messages"][-1]["content"]]
    assert len(again) == 2
    headline = mt_bench_section(artifact).headline
    assert "(2 of 8 turns without a readable judgement)" in headline
    tables = [b for b in mt_bench_section(artifact).chapters[0].blocks if isinstance(b, Table)]
    assert tables[0].rows[1][-3:] == (8, 0, 2)


def test_a_comparison_with_a_baseline(tmp_path: Path, intact: None) -> None:
    def better(question: str) -> str:
        first = question.index("By dpo") < question.index("By sft")
        return f"[[{'A' if first else 'B'}]]"

    _, work, artifact = play(tmp_path, 4, better, baseline="sft")
    assert work.counts["win_rate/dpo"] == 1.0 and "win_rate/sft" not in work.counts
    section = mt_bench_section(artifact)
    assert section.headline == (
        "dpo has a win rate against sft of 1.00 [1.00, 1.00] on 4 two-turn questions. "
        "The intervals are too narrow, because there are few questions."
    )
    [bars] = [block for block in section.chapters[0].blocks if isinstance(block, Bars)]
    assert bars.bars == (("dpo", Interval(1, 1, 1)),)
    # A radar chart needs at least three categories.
    assert not any(isinstance(block, Radar) for block in section.chapters[0].blocks)
    tables = [block for block in section.chapters[0].blocks if isinstance(block, Table)]
    assert tables[0].rows[0][4:6] == ((8, 0, 0), 0)


RECIPE = """
models:
  a: {engine: openai, model: a, base_url: "http://127.0.0.1:1/v1"}
  rules: {engine: rules}
stages:
  answers: {kind: mt_bench_answers, models: [a]}
  more: {kind: mt_bench_answers, models: [a]}
  score: {kind: mt_bench, judge: a, answers: [answers]}
"""


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("score.judge=rules", "engine rules has no form 'turn_score'; name another judge"),
        ("answers.models=[a,a]", "names a model twice; remove one"),
        ("score.answers=[answers,more]", "two stages have answers of 'a'; remove one of them"),
        ("score.baseline=b", "baseline: no stage has answers of 'b'"),
        ("score.baseline=a", "baseline: 'a' is the only model; add answers of another one"),
        ("answers.questions=mine.jsonl", "cannot read"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(setting: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(Permanent) as error:
        check_files(load(tmp_path / "recipe.yaml", KINDS, [setting]))
    assert line in str(error.value)


def test_the_plan_counts_the_calls(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    stages = load(tmp_path / "recipe.yaml", KINDS, ["answers.models=[a]"]).stages
    answers, score_stage = stages["answers"], stages["score"]
    assert answers.expected({}) == 16 and answers.calls({}, {})["a"].calls == 32
    judged = score_stage.calls({"answers": 16}, {"answers": answers})["a"]
    assert judged.calls == 32


def test_a_context_must_have_room_for_both_answers(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load(tmp_path / "recipe.yaml", KINDS, ["models.a.context=200"])
    steps = make_plan(recipe, Store(tmp_path))
    with pytest.raises(Permanent, match="answers of up to 2048 tokens leave no room"):
        check_settings(recipe, steps)


def test_published_questions_are_fetched_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with endpoint(lambda number, body: GOOD) as server:
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("http://127.0.0.1:1/v1", server.url))
        recipe = load(tmp_path / "recipe.yaml", KINDS, ["answers.questions=mt_bench"])
        store = Store(tmp_path / "runs")
        store.prepare()
        with pytest.raises(Permanent, match="questions: pip could not download .*; check pip's"):
            preflight(recipe, store, make_plan(recipe, store))
