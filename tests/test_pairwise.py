"""Tests the figures of a comparison against values computed by hand from a few rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import run_here

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.judge import figures, measures, pairwise, section
from zephyr_ray.judge.earlier import complete
from zephyr_ray.judge.figures import Figure, summary
from zephyr_ray.judge.gathering import describe
from zephyr_ray.judge.length_control import length_controlled
from zephyr_ray.judge.measures import pass_difference, passed, win_differences
from zephyr_ray.judge.pairwise import Pairwise
from zephyr_ray.judge.statistics import bootstrap, paired_difference
from zephyr_ray.judge.wording import control_note
from zephyr_ray.manifest import Manifest
from zephyr_ray.section import Bars, Block, Interval, Sample, Scatter, Table, Text
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, write_rows


def row(
    number: int,
    verdict: float | None,
    checks: dict[str, bool] | None,
    words: list[int],
    **more: Any,
) -> dict[str, Any]:
    scores = [{"score": 1.0, "reason": "", "checks": checks}] if checks is not None else None
    kind = more.pop("kind", None)
    return {
        "prompt_id": f"p{number}",
        "verdict": verdict,
        "scores": scores,
        "words": words,
        "characters": [5 * count for count in words],
        **{"leaks_role": False, "cut": False},
        "constraint": {"kind": kind} if kind else None,
        **more,
    }


PASS = {"constraint": True, "ended": True, "no_loop": True, "on_topic": True}
ROWS = [
    row(1, 1.0, PASS, [10, 4], kind="json"),
    row(2, 1.0, {**PASS, "on_topic": False}, [2, 9], kind="json"),
    row(3, 0.0, {**PASS, "constraint": False}, [8, 3], kind="bullets"),
    row(4, 0.5, {**PASS, "ended": False}, [4, 4], kind="json", flip=True),
    row(5, None, {"ended": True, "no_loop": True, "on_topic": True}, [1, 7]),
]


@pytest.mark.parametrize(
    ("checks", "held"),
    [
        (PASS, True),
        ({**PASS, "on_topic": False}, True),
        ({**PASS, "constraint": False}, False),
        ({**PASS, "ended": False}, False),
        ({**PASS, "no_loop": False}, False),
        ({}, None),  # a reward model checks nothing
        (None, None),
    ],
)
def test_passed_is_every_check_but_the_topic(
    checks: dict[str, bool] | None, held: bool | None
) -> None:
    assert passed(row(1, 1.0, checks, [1, 1])) is held


def test_summary_by_hand() -> None:
    figures = summary(ROWS, seed=3)
    assert figures["win_rate"] == 0.625  # (1 + 1 + 0 + 0.5) / 4, without the unreadable one
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 1, 1)
    assert (figures["flips"], figures["parse_failures"], figures["prompts"]) == (1, 1, 5)
    assert figures["pass_rate"] == 0.6  # rows 1, 2 and 5
    assert figures["on_topic"] == 0.8
    assert figures["words"] == 5.0  # (10 + 2 + 8 + 4 + 1) / 5
    # Decided, with different lengths: row 1 longer and won, 2 shorter and won, 3 longer and lost.
    assert figures["length_bias"] == pytest.approx(1 / 3)
    assert figures["by_constraint"] == {
        "bullets": {"pass_rate": 0.0, "prompts": 1},
        "json": {"pass_rate": 2 / 3, "prompts": 3},
    }
    assert (0.625, figures["low"], figures["high"]) == bootstrap([1, 1, 0, 0.5], 3)
    assert (0.6, figures["pass_low"], figures["pass_high"]) == bootstrap([1, 1, 0, 0, 1], 3)


def test_position_figures_by_hand() -> None:
    rows = [
        row(1, 1.0, None, [1, 1], orders=[1.0, 1.0]),  # the one shown first wins once, loses once
        row(2, 0.5, None, [1, 1], orders=[1.0, 0.0], flip=True),  # it wins both times
        row(3, 0.55, None, [1, 1], orders=[0.9, 0.2]),  # shares 0.9 and 0.8; the winner changes
        row(4, 0.45, None, [1, 1], orders=[0.4, 0.5]),  # shares 0.4 and 0.5; a tie is no flip
        row(5, None, None, [1, 1], orders=[1.0, None]),  # one unreadable reply
        row(6, 0.5, None, [1, 1]),  # identical answers: the judge was not asked
        row(7, 0.5, None, [1, 1], flip=True),  # from a version without orders
    ]
    figures = summary(rows, seed=2)
    assert figures["flips"] == 3  # prompts 2, 3 and 7
    assert figures["orders_read"] == 9
    shares = [1, 0, 1, 1, 0.9, 0.8, 0.4, 0.5, 1]
    prompts = ["p1", "p1", "p2", "p2", "p3", "p3", "p4", "p4", "p5"]
    ends = tuple(figures[f"first_position{end}"] for end in ("", "_low", "_high"))
    assert ends == bootstrap(shares, 2, prompts)
    assert ends[0] == pytest.approx(6.6 / 9)
    # Above 0.5 is a win (prompts 1 and 3), below 0.5 a loss (prompt 4).
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 3, 1)


def test_standard_error_counts_prompts() -> None:
    # Deviations 0.5, 0.5, -0.5, -0.5: sqrt(4 × 0.25) / 4.
    rows = [row(n, verdict, None, [1, 1]) for n, verdict in enumerate([1.0, 1.0, 0.0, 0.0])]
    assert summary(rows, seed=0)["standard_error"] == 0.25


def test_summary_of_a_model_judge_has_no_pass_rate() -> None:
    figures = summary([row(n, 1.0, None, [2, 1], kind="json") for n in range(3)], seed=0)
    assert (figures["win_rate"], figures["low"], figures["high"]) == (1.0, 1.0, 1.0)
    assert figures["pass_rate"] is None and figures["on_topic"] is None
    assert figures["by_constraint"] == {}


def test_on_topic_is_a_share_of_the_answers_whose_topic_was_checked() -> None:
    unchecked = {"constraint": True, "ended": True, "no_loop": True}
    checks = [PASS, PASS, {**PASS, "on_topic": False}, unchecked, None]
    figures = summary([row(n, 1.0, held, [1, 1]) for n, held in enumerate(checks)], seed=0)
    assert figures["on_topic"] == pytest.approx(2 / 3)


def test_answers_to_other_prompts_with_the_same_ids_are_refused(tmp_path: Path) -> None:
    inputs = {}
    for stage, prompt in (("base", "Name a fish."), ("dpo", "Name a bird.")):
        (tmp_path / stage).mkdir()
        answer = {"model": stage, "text": "Eel.", "finish_reason": "stop"}
        write_rows(tmp_path / stage, [{"id": "p00000", "prompt": prompt, "completions": [answer]}])
        inputs[stage] = Artifact(tmp_path / stage, Manifest(kind="text", key=stage, files={}))
    work = Work("winrate", tmp_path / "made", 0, inputs, {}, {})
    with pytest.raises(Permanent, match="'dpo' answers other prompts than 'base'"):
        Pairwise(judge="judge", baseline="base", answers=["dpo"]).run(work)


@pytest.mark.parametrize(
    ("ids", "says"),
    [(["p1"], "'dpo' answers none of the prompts of 'base'"), ([], "'dpo' has no answers")],
)
def test_a_model_without_answers_to_the_baselines_prompts_is_refused(
    ids: list[str], says: str, tmp_path: Path
) -> None:
    inputs = {}
    for stage, names in (("base", ["p0"]), ("dpo", ids)):
        (tmp_path / stage).mkdir()
        answer = {"model": stage, "text": "Eel.", "finish_reason": "stop"}
        rows = [{"id": name, "prompt": "Name a fish.", "completions": [answer]} for name in names]
        write_rows(tmp_path / stage, rows)
        inputs[stage] = Artifact(tmp_path / stage, Manifest(kind="text", key=stage, files={}))
    work = Work("winrate", tmp_path / "made", 0, inputs, {}, {})
    with pytest.raises(Permanent, match=says):
        Pairwise(judge="judge", baseline="base", answers=["dpo"]).run(work)


def test_a_baseline_compared_only_with_itself_is_refused() -> None:
    stage = Pairwise(judge="judge", answers=["base"], baseline="base", control="base")
    with pytest.raises(Permanent, match="'base' would be compared only with itself; add"):
        stage.check({}, {})


def test_letters_of_a_script_without_spaces_are_counted_as_words() -> None:
    facts = describe({"text": "山水花鳥風月"}, {"text": "It's a well-kept one."})
    assert (facts["words"], facts["characters"]) == ([6, 4], [6, 21])


def test_facts_are_those_of_the_models_own_answer() -> None:
    leaking = {"text": "Yes.\nUser: And now?", "finish_reason": "length"}
    ended = {"text": "Yes.", "finish_reason": "stop"}
    facts = [describe(leaking, ended), describe(ended, leaking)]
    assert [(f["leaks_role"], f["cut"]) for f in facts] == [(True, True), (False, False)]


def test_without_any_verdict_the_win_rate_is_none() -> None:
    figures = summary([row(1, None, None, [1, 1])], seed=0)
    assert (figures["win_rate"], figures["low"], figures["high"]) == (None, None, None)
    assert (figures["parse_failures"], figures["length_bias"]) == (1, None)


def test_pass_difference_is_over_the_common_prompts() -> None:
    failed = {**PASS, "constraint": False}
    a = [row(n, 1.0, PASS, [1, 1]) for n in (1, 2, 3)]
    b = [row(1, 0.5, failed, [1, 1]), row(2, 0.5, PASS, [1, 1]), row(9, 0.5, failed, [1, 1])]
    difference = pass_difference(a, b, seed=0)
    assert difference is not None
    assert difference["pass_difference"] == 0.5  # prompts 1 and 2: (1 - 0 + 1 - 1) / 2
    assert (difference["low"], difference["high"]) == (0.0, 1.0)
    assert pass_difference(b, a, seed=0)["pass_difference"] == -0.5  # type: ignore[index]


def test_models_are_compared_on_their_common_prompts() -> None:
    verdicts = {
        "sft": {1: 1.0, 2: 0.5, 3: 0.0},
        "dpo": {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.5},
        "unread": {1: None},
    }
    by_model = {
        model: [row(n, verdict, None, [1, 1]) for n, verdict in by_prompt.items()]
        for model, by_prompt in verdicts.items()
    }
    [difference] = win_differences(by_model, seed=3)
    assert (difference["a"], difference["b"]) == ("dpo", "sft")
    # Prompts 1, 2 and 3: (1 - 1 + 1 - 0.5 + 0.5 - 0) / 3.
    ends = (difference["win_difference"], difference["low"], difference["high"])
    assert ends == paired_difference([1, 1, 0.5], [1, 0.5, 0], 3)
    assert difference["win_difference"] == pytest.approx(1 / 3)


def test_the_last_of_equal_models_counts_as_the_best() -> None:
    by_model = {model: [row(1, 1.0, None, [1, 1])] for model in ("sft", "dpo")}
    assert [(d["a"], d["b"]) for d in win_differences(by_model, 0)] == [("dpo", "sft")]


def test_the_best_model_s_differences_come_first() -> None:
    verdicts = {"control": 0.5, "best": 1.0, "dpo": 0.0}
    by_model = {model: [row(1, verdict, None, [1, 1])] for model, verdict in verdicts.items()}
    differences = win_differences(by_model, 0)
    assert [(d["a"], d["b"], d["win_difference"]) for d in differences] == [
        ("best", "control", 0.5),
        ("best", "dpo", 1.0),
        ("control", "dpo", 0.5),
    ]


def test_pass_difference_without_common_prompts_is_none() -> None:
    a, b = [row(1, 1.0, PASS, [1, 1])], [row(2, 1.0, PASS, [1, 1])]
    assert pass_difference(a, b, seed=0) is None
    assert pass_difference(a, [row(1, 1.0, None, [1, 1])], seed=0) is None


@pytest.mark.parametrize(
    ("low", "high", "ends", "says"),
    [
        (0.01, 0.2, "[+0.010, +0.200]", "improves on plain SFT"),
        (-0.2, -0.01, "[−0.200, −0.010]", "does worse"),
        (-0.1, 0.1, "[−0.100, +0.100]", "adds nothing"),
    ],
)
def test_the_control_note_follows_the_interval(
    low: float, high: float, ends: str, says: str
) -> None:
    other = {"a": "dpo", "b": "base", "win_difference": 0.5, "low": 0.4, "high": 0.6}
    difference = {"a": "dpo", "b": "control", "win_difference": 0.05, "low": low, "high": high}
    note = control_note(against_control(win_differences=[other, difference]))
    assert says in note
    assert f"win rate +0.050 {ends}" in note


def test_the_control_note_without_figures_says_so() -> None:
    assert "not isolated" in control_note(against_control())


def against_control(**differences: Any) -> dict[str, Any]:
    models: dict[str, Any] = {"base": {}, "control": {}, "dpo": {}}
    common = {"baseline": "base", "control": "control", "models": models, "differences": []}
    return common | differences


BULLETS = "* a cod\n* an eel"


def compared(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: dict[str, list[str]],
    engine: Any = None,
    /,
    **settings: Any,
) -> Artifact:
    """Returns the artifact of a pairwise stage. `answers` has the texts of each model, the baseline
    first. Each prompt asks for two bullets. The judge is called in this process."""
    run_here(monkeypatch, pairwise, engine)
    inputs = {}
    for model, texts in answers.items():
        made = folder / model
        made.mkdir()
        write_rows(
            made,
            [
                {
                    "id": f"p{number}",
                    "prompt": f"Name fish number {number}. Give 2 bullets.",
                    "instruction": f"Name fish number {number}.",
                    "constraint": {"kind": "bullets", "n": 2},
                    "completions": [{"model": model, "text": text, "finish_reason": "stop"}],
                }
                for number, text in enumerate(texts)
            ],
        )
        inputs[f"answers_{model}"] = Artifact(made, Manifest(kind="text", key=model, files={}))
    baseline, *others = inputs
    stage = Pairwise(**{"judge": "judge", "baseline": baseline, "answers": others, **settings})
    models = {"judge": Model("judge", RulesSettings())}
    work = Work("winrate", folder / "winrate", 0, inputs, models, {})
    work.folder.mkdir()
    stage.run(work)
    return Artifact(work.folder, Manifest(kind="pairwise", key="k", files={}, counts=work.counts))


def result(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / "result.json").read_text(encoding="utf-8"))


def blocks(artifact: Artifact, kind: type) -> list[Any]:
    """Returns the blocks of one type in what the artifact contributes to the report."""
    chapters = section.pairwise_section(artifact).chapters
    every: list[Block] = [block for chapter in chapters for block in chapter.blocks]
    return [block for block in every if isinstance(block, kind)]


def test_a_model_without_a_judged_answer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`max_failed` may allow that its rows all failed."""

    class Refusing:
        def ask_for(self, model: Model, row: dict[str, Any]) -> Any:
            if row["model"] == "dpo":
                raise RowError("refused", "refused")
            return RulesSettings().start(0).ask_for(model, row)

    answers = {"base": ["Cod."], "sft": [BULLETS], "dpo": [BULLETS]}
    artifact = compared(tmp_path, monkeypatch, answers, Refusing())
    figures = result(artifact)
    assert (list(figures["models"]), figures["differences"]) == (["base", "sft"], [])
    shown = [[str(row[0]) for row in table.rows] for table in blocks(artifact, Table)]
    assert ["base", "sft"] in shown, shown


@pytest.fixture
def fish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Compares models: base keeps no constraint, sft one of two, dpo both."""
    answers = {
        "base": ["Cod.", "Some eel."],
        "sft": [BULLETS, "An eel, I guess."],
        "dpo": [BULLETS, BULLETS],
    }
    return compared(tmp_path, monkeypatch, answers)


def test_a_model_that_keeps_its_constraints_wins(fish: Artifact) -> None:
    models = result(fish)["models"]
    rates = {m: (v["win_rate"], v["wins"], v["ties"], v["losses"]) for m, v in models.items()}
    assert rates == {"base": (0.5, 0, 2, 0), "sft": (0.75, 1, 1, 0), "dpo": (1.0, 2, 0, 0)}
    assert {m: v["pass_rate"] for m, v in models.items()} == {"base": 0.0, "sft": 0.5, "dpo": 1.0}
    # An asterisk counts as a word: 6 in two bullets, 4 in the other answer of sft, 1 and 2 in base.
    assert {m: v["words"] for m, v in models.items()} == {"base": 1.5, "sft": 5.0, "dpo": 6.0}


def test_differences_are_those_of_the_last_model(fish: Artifact) -> None:
    differences = [(d["a"], d["b"], d["pass_difference"]) for d in result(fish)["differences"]]
    assert differences == [("dpo", "base", 1.0), ("dpo", "sft", 0.5)]


def test_rows_and_samples_have_each_model_s_own_verdict(fish: Artifact) -> None:
    rows = {row["id"]: row for row in fish.rows()}
    verdicts = {i: {m: v["verdict"] for m, v in r["verdicts"].items()} for i, r in rows.items()}
    assert verdicts == {
        "p0": {"base": 0.5, "sft": 1.0, "dpo": 1.0},
        "p1": {"base": 0.5, "sft": 0.5, "dpo": 1.0},
    }
    assert rows["p1"]["answers"]["sft"]["text"] == "An eel, I guess."
    assert rows["p1"]["answers"]["dpo"]["score"] == 10
    samples = {s.prompt: {a.model: a.outcome for a in s.answers} for s in blocks(fish, Sample)}
    assert samples["Name fish number 1. Give 2 bullets."] == {
        "base": None,
        "sft": "tie",
        "dpo": "win",
    }


def test_counts_are_the_plotted_figures(fish: Artifact) -> None:
    assert fish.manifest.counts == {
        "unparsable": 0,
        "flips": 0,
        "win_rate/sft": 0.75,
        "win_rate/dpo": 1.0,
        "pass_rate/base": 0.0,
        "pass_rate/sft": 0.5,
        "pass_rate/dpo": 1.0,
        "rows": 2,
    }


def test_the_control_note_has_the_sign_of_last_minus_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"base": ["Cod."] * 2, "control": [BULLETS] * 2, "dpo": ["Cod."] * 2}
    note = control_note(result(compared(tmp_path, monkeypatch, answers, control="answers_control")))
    assert note.startswith("dpo against control") and "win rate −0.500 [−0.500, −0.500]" in note
    assert "does worse" in note


def test_a_control_that_is_not_among_the_answers_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"base": ["Cod."] * 2, "control": ["Cod."] * 2, "dpo": [BULLETS] * 2}
    made = compared(
        tmp_path, monkeypatch, texts, answers=["answers_dpo"], control="answers_control"
    )
    differences = {(d["a"], d["b"]): d["pass_difference"] for d in result(made)["differences"]}
    assert differences == {("dpo", "base"): 1.0, ("dpo", "control"): 1.0}
    assert "dpo against control" in control_note(result(made))


class Scripted:
    """Takes the verdict, and whether the constraint is kept, from the answer: "0.5 kept"."""

    def ask_for(self, model: Model, row: dict[str, Any]) -> "Scripted":
        return self

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        assert form == "pairwise"
        verdict, kept = answers[0]["text"].split()
        score = {"score": 1.0, "reason": "", "checks": {"constraint": kept == "kept"}}
        read = None if verdict == "?" else float(verdict)
        return {"verdict": read, "reason": "", "scores": [score, score], "flip": verdict == "0.5"}


def test_every_interval_uses_the_seed_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [1.0] * 15 + [0.5] * 9 + [0.0] * 23
    kept = [number % 3 == 0 for number in range(47)]
    texts = [f"{v} {'kept' if k else 'broken'}" for v, k in zip(verdicts, kept, strict=True)]
    for values in (verdicts, kept):
        assert bootstrap(values, 7) != bootstrap(values, 0), "the seed must change the interval"
    made = compared(
        tmp_path, monkeypatch, {"base": ["0.5 broken"] * 47, "dpo": texts}, Scripted(), seed=7
    )
    model, [difference] = result(made)["models"]["dpo"], result(made)["differences"]
    assert (model["win_rate"], model["low"], model["high"]) == bootstrap(verdicts, 7)
    assert (model["pass_rate"], model["pass_low"], model["pass_high"]) == bootstrap(kept, 7)
    ends = (difference["pass_difference"], difference["low"], difference["high"])
    assert ends == paired_difference(kept, [0] * 47, 7)


def test_unparsable_verdicts_and_flips_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"base": ["0 kept"] * 3, "dpo": ["? kept", "0.5 kept", "1 kept"]}
    made = compared(tmp_path, monkeypatch, answers, Scripted())
    assert (made.manifest.counts["unparsable"], made.manifest.counts["flips"]) == (1, 1)
    assert result(made)["models"]["dpo"]["win_rate"] == 0.75  # (0.5 + 1) / 2


def test_result_has_the_names_that_earlier_versions_wrote(fish: Artifact) -> None:
    written = result(fish)
    assert set(written) == {
        *("baseline", "judge", "control", "models", "differences", "win_differences"),
    }
    assert set(written["models"]["dpo"]) == {
        *("win_rate", "low", "high", "wins", "ties", "losses", "flips", "parse_failures"),
        *("prompts", "pass_rate", "pass_low", "pass_high", "on_topic", "words", "length_bias"),
        *("by_constraint", "left_out", "asked", "coverage", "standard_error", "leaks_role", "cut"),
        *("length_controlled", "length_controlled_low", "length_controlled_high"),
        *("length_control_move", "length_control_obstacle"),
        *("first_position", "first_position_low", "first_position_high", "orders_read"),
    }


def test_prompts_that_the_win_rate_leaves_out_are_counted_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model dpo answers three of four prompts; one reply of the judge is unparsable."""
    answers = {"base": ["0 kept"] * 4, "dpo": ["? kept", "1 kept", "1 kept"]}
    made = compared(tmp_path, monkeypatch, answers, Scripted())
    figures = result(made)["models"]["dpo"]
    assert (figures["win_rate"], figures["left_out"], figures["parse_failures"]) == (1.0, 2, 1)
    assert (figures["asked"], figures["coverage"]) == (4, 0.5)
    table, behind = blocks(made, Table)[:2]
    assert [column.heading for column in table.columns[:3]] == ["Model", "Left out", "Win rate"]
    assert [row[1] for row in table.rows] == [None, 2]
    assert [column.heading for column in behind.columns[:3]] == ["Model", "Asked", "Coverage"]
    assert [row[:3] for row in behind.rows] == [("dpo", 4, 0.5)]
    headline = section.pairwise_section(made).headline
    assert (
        "on 2 held-out prompts (of 4, 1 not answered by both and 1 without a readable verdict)"
    ) in headline


def test_a_lack_of_readable_verdicts_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"base": ["0 kept"] * 3, "dpo": ["? kept"] * 3}
    made = compared(tmp_path, monkeypatch, answers, Scripted())
    headline = section.pairwise_section(made).headline
    assert headline.startswith(
        "dpo has no win rate against base: no readable verdict (0 of 3 prompts)."
    )
    assert not any(bars.title.startswith("Win rate") and bars.bars for bars in blocks(made, Bars))


def test_two_empty_answers_have_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"base": ["", BULLETS, "\n"], "dpo": ["", BULLETS, "\u200b"]}
    made = compared(tmp_path, monkeypatch, answers)
    figures = result(made)["models"]["dpo"]
    assert (figures["ties"], figures["parse_failures"], figures["left_out"]) == (1, 0, 2)
    assert (figures["prompts"], figures["pass_rate"]) == (3, 1 / 3)
    assert (made.manifest.counts["unparsable"], made.manifest.counts["both_empty"]) == (0, 2)


def test_models_with_only_empty_answers_have_no_win_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compared(tmp_path, monkeypatch, {"base": [""] * 3, "dpo": [""] * 3})
    assert result(made)["models"]["dpo"]["win_rate"] is None


def test_unparsable_verdicts_are_flaws_but_two_empty_answers_are_not() -> None:
    unreadable = {"verdict": None, "reason": "unparsable: judge: 'hm'"}
    assert [str(pairwise._flaw(unreadable)), pairwise._flaw({"verdict": 0.5, "reason": ""})] == [
        "unparsable: judge: 'hm'",
        None,
    ]
    assert pairwise._flaw({"verdict": None, "reason": measures.BOTH_EMPTY}) is None


def test_a_new_figure_needs_only_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Figure(
        names=("short", "short_low", "short_high"),
        compute=lambda rows, seed: bootstrap([row["words"][0] < 3 for row in rows], seed),
        heading="Short",
        help="share of answers under three words.",
        plot="Short answers",
    )
    for module in (figures, pairwise, section):
        monkeypatch.setattr(module, "FIGURES", (*figures.FIGURES, short))
    made = compared(tmp_path, monkeypatch, {"base": ["Cod."] * 2, "dpo": [BULLETS] * 2})
    assert result(made)["models"]["base"]["short"] == 1.0
    assert made.manifest.counts["short/dpo"] == 0.0
    table, bars = blocks(made, Table)[0], blocks(made, Bars)[-1]
    assert table.columns[-1].heading == "Short"
    assert [row[-1] for row in table.rows] == [Interval(1.0, 1.0, 1.0), Interval(0.0, 0.0, 0.0)]
    assert table.help[-1] == "Short: share of answers under three words."
    assert (bars.title, [name for name, _ in bars.bars]) == ("Short answers", ["base", "dpo"])


def test_a_figure_that_no_model_has_takes_no_column(fish: Artifact) -> None:
    headings = [column.heading for column in blocks(fish, Table)[0].columns]
    assert "Checks passed" in headings and "On topic" not in headings


def long_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Returns a comparison of 60 prompts in which longer answers win more often. The baseline's
    answers have 9 characters, the model's 5 to 64."""
    answers = []
    for number in range(60):
        wins = number % 3 != 0 if number >= 20 else number % 3 == 0
        answers.append(f"{float(wins)} k{'e' * number}")
    return compared(folder, monkeypatch, {"base": ["0.5 kept."] * 60, "dpo": answers}, Scripted())


def test_a_result_has_the_rate_at_equal_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = long_comparison(tmp_path, monkeypatch)
    figures = result(made)["models"]["dpo"]
    verdicts = [float(n % 3 != 0 if n >= 20 else n % 3 == 0) for n in range(60)]
    expected = length_controlled(verdicts, [n - 4 for n in range(60)], range(60))
    names = ("length_controlled", "length_controlled_low", "length_controlled_high")
    assert tuple(figures[name] for name in names) == pytest.approx(expected)
    assert figures["length_control_move"] == pytest.approx(expected[0] - sum(verdicts) / 60)
    assert made.manifest.counts["length_controlled/dpo"] == figures["length_controlled"]
    [table, _] = blocks(made, Table)[:2]
    columns = [column.heading for column in table.columns]
    [_, cells] = table.rows
    assert cells[columns.index("At equal length")] == Interval(*(figures[name] for name in names))
    assert table.columns[columns.index("Move")].signed


def test_a_result_of_an_earlier_version_gets_its_missing_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = long_comparison(tmp_path, monkeypatch)
    written = result(made)
    kept = ("win_rate", "low", "high", "wins", "ties", "losses", "flips", "parse_failures")
    old = {
        model: {name: figures[name] for name in (*kept, "prompts", "words")}
        for model, figures in written["models"].items()
    }
    old["dpo"]["low"] = 0.123
    del written["win_differences"]
    rows = made.rows()
    completed = complete({**written, "models": old}, rows, seed=0)["models"]["dpo"]
    now = result(made)["models"]["dpo"]
    for name in ("length_controlled", "length_control_move", "standard_error", "cut"):
        assert completed[name] == now[name]
    assert completed["low"] == 0.123, "what the earlier version wrote stays"
    assert completed["pass_rate"] is None, "rows do not have the checks"


def test_a_result_with_only_the_best_model_s_differences_gets_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"base": ["Cod."] * 2, "x": ["Cod."] * 2, "y": [BULLETS, "Cod."], "z": [BULLETS] * 2}
    made = compared(tmp_path, monkeypatch, answers)
    written = result(made)
    differences = written["win_differences"]
    assert [(d["a"], d["b"]) for d in differences] == [("z", "y"), ("z", "x"), ("y", "x")]
    old = {**written, "win_differences": differences[:2]}
    assert complete(old, made.rows(), seed=0)["win_differences"] == differences


def test_the_win_rates_on_the_page_have_their_paired_differences(fish: Artifact) -> None:
    [expected] = result(fish)["win_differences"]
    win_rate, *others = blocks(fish, Bars)
    [(a, b, difference)] = win_rate.differences
    assert (a, b, difference.value) == ("dpo", "sft", expected["win_difference"])
    assert (difference.low, difference.high) == (expected["low"], expected["high"])
    assert not any(bars.differences for bars in others)


def test_a_complete_result_stays_as_it_is(fish: Artifact) -> None:
    written = result(fish)
    assert complete(written, [], seed=0) is written


def test_length_is_plotted_against_outcome_and_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = long_comparison(tmp_path, monkeypatch)
    outcome, score = blocks(made, Scatter)
    [(model, points)] = outcome.series
    # Ten prompts per point, by length; the first ten are 4.5 - 4 characters longer on average.
    assert (model, len(points), points[0]) == ("dpo", 6, (0.5, 0.4))
    assert [y for _, y in points] == pytest.approx([0.4, 0.3, 0.7, 0.6, 0.7, 0.7])
    assert (outcome.x, outcome.y) == ("Characters more than base", "Win rate")
    assert [name for name, _ in score.series] == ["base", "dpo"]


def test_few_answers_are_not_plotted(fish: Artifact) -> None:
    assert blocks(fish, Scatter) == []


@pytest.mark.parametrize(
    ("paid", "says"),
    [
        ({}, "Judging took 1 min 35 s."),
        ({"requests": 3, "dollars": 1.5}, "took 1 min 35 s and cost $1.50 in 3 requests."),
        (
            {"requests": 3, "dollars": 1.5, "unknown_requests": 1, "unknown_dollars": 0.25},
            "and cost at most $1.75 in 4 requests.",
        ),
    ],
)
def test_the_report_states_the_cost_of_judging(
    fish: Artifact, paid: dict[str, float], says: str
) -> None:
    counts = fish.manifest.counts | {f"paid/judge/{name}": value for name, value in paid.items()}
    manifest = fish.manifest.model_copy(update={"seconds": 95.0, "counts": counts})
    assert says in blocks(Artifact(fish.folder, manifest), Text)[0].text


def test_a_sample_has_its_kind_and_the_outcome_of_a_fraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"base": ["0.5 kept"] * 3, "dpo": ["0.7 kept", "0.2 kept", "0.5 kept"]}
    made = compared(tmp_path, monkeypatch, answers, Scripted())
    rows = made.rows()
    rows[0]["verdicts"]["dpo"]["orders"] = [0.9, 0.5]
    rows[1]["verdicts"]["dpo"]["orders"] = [0.2, None]
    write_rows(made.folder, rows)
    samples = {sample.prompt[17]: sample for sample in blocks(made, Sample)}
    outcomes = {number: sample.answers[1].outcome for number, sample in samples.items()}
    assert outcomes == {"0": "win", "1": "loss", "2": "tie"}
    assert samples["0"].kind == "bullets"
    assert samples["0"].answers[1].facts[-1] == (
        "share of the win 0.90 shown first, 0.50 shown second"
    )
    assert all("shown first" not in fact for fact in samples["1"].answers[1].facts)


def test_rows_keep_the_orders_of_a_judgement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ordered(Scripted):
        async def judge(self, *asked: Any) -> dict[str, Any]:
            return await super().judge(*asked) | {"orders": [0.9, 0.2], "flip": True}

    answers = {"base": ["0.5 kept"] * 3, "dpo": ["0.55 kept"] * 3}
    made = compared(tmp_path, monkeypatch, answers, Ordered())
    assert made.rows()[0]["verdicts"]["dpo"] == {
        **{"verdict": 0.55, "reason": "", "flip": True, "orders": [0.9, 0.2]},
    }
    behind = blocks(made, Table)[1]
    columns = [column.heading for column in behind.columns]
    rate = (3 * 0.9 + 3 * 0.8) / 6
    assert behind.rows[0][columns.index("First position")].value == pytest.approx(rate)
