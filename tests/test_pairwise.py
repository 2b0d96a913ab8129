"""The figures of a comparison, by hand on rows few enough to count."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from in_process import run_here

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.judge import figures, pairwise, section
from zephyr_ray.judge.figures import Figure, pass_difference, passed, summary
from zephyr_ray.judge.pairwise import Pairwise, compare
from zephyr_ray.judge.statistics import bootstrap, paired_difference
from zephyr_ray.judge.wording import control_note
from zephyr_ray.manifest import Manifest
from zephyr_ray.section import Bars, Block, Interval, Sample, Table
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
        (None, None),
    ],
)
def test_passed_is_every_check_but_the_topic(
    checks: dict[str, bool] | None, held: bool | None
) -> None:
    assert passed(row(1, 1.0, checks, [1, 1])) is held


def test_summary_by_hand() -> None:
    figures = summary(ROWS, seed=3)
    assert figures["win_rate"] == 0.625  # (1 + 1 + 0 + 0.5) / 4: the unread verdict is no loss
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 1, 1)
    assert (figures["flips"], figures["parse_failures"], figures["prompts"]) == (1, 1, 5)
    assert figures["pass_rate"] == 0.6  # rows 1, 2 and 5
    assert figures["on_topic"] == 0.8
    assert figures["words"] == 5.0  # (10 + 2 + 8 + 4 + 1) / 5
    # Decided and of two lengths: row 1 longer and won, 2 shorter and won, 3 longer and lost.
    assert figures["length_bias"] == pytest.approx(1 / 3)
    assert figures["by_constraint"] == {
        "bullets": {"pass_rate": 0.0, "prompts": 1},
        "json": {"pass_rate": 2 / 3, "prompts": 3},
    }
    assert (0.625, figures["low"], figures["high"]) == bootstrap([1, 1, 0, 0.5], 3)
    assert (0.6, figures["pass_low"], figures["pass_high"]) == bootstrap([1, 1, 0, 0, 1], 3)


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


def test_answers_to_other_prompts_of_the_same_ids_are_refused(tmp_path: Path) -> None:
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


def test_letters_of_a_script_without_spaces_are_counted_as_words() -> None:
    async def judge(form: str, row: dict[str, Any], answers: list[dict[str, Any]]) -> Any:
        return {"verdict": 1.0, "reason": ""}

    asked = {"id": "a", "prompt_id": "a", "model": "m", "constraint": None}
    sides = {"first": {"text": "山水花鳥風月"}, "second": {"text": "It's a well-kept one."}}
    judged = asyncio.run(compare({**asked, **sides}, SimpleNamespace(judge=judge)))
    assert judged["words"] == [6, 4]


def test_no_verdict_at_all_says_that_nothing_is_known() -> None:
    figures = summary([row(1, None, None, [1, 1])], seed=0)
    assert (figures["win_rate"], figures["low"], figures["high"]) == (None, None, None)
    assert (figures["parse_failures"], figures["length_bias"]) == (1, None)


def test_pass_difference_is_over_the_prompts_of_both() -> None:
    failed = {**PASS, "constraint": False}
    a = [row(n, 1.0, PASS, [1, 1]) for n in (1, 2, 3)]
    b = [row(1, 0.5, failed, [1, 1]), row(2, 0.5, PASS, [1, 1]), row(9, 0.5, failed, [1, 1])]
    difference = pass_difference(a, b, seed=0)
    assert difference is not None
    assert difference["pass_difference"] == 0.5  # prompts 1 and 2: (1 - 0 + 1 - 1) / 2
    assert (difference["low"], difference["high"]) == (0.0, 1.0)
    assert pass_difference(b, a, seed=0)["pass_difference"] == -0.5  # type: ignore[index]


def test_pass_difference_of_nothing_in_common_is_none() -> None:
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
    difference = {"a": "dpo", "b": "control", "pass_difference": 0.05, "low": low, "high": high}
    other = {"a": "dpo", "b": "base", "pass_difference": 0.5, "low": 0.4, "high": 0.6}
    note = control_note([other, difference], "dpo", "control")
    assert says in note
    assert f"+0.050 {ends}" in note


def test_the_control_note_without_figures_says_so() -> None:
    assert "not isolated" in control_note([], "dpo", "control")


BULLETS = "* a cod\n* an eel"


def compared(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: dict[str, list[str]],
    engine: Any = None,
    /,
    **settings: Any,
) -> Artifact:
    """The artifact of a pairwise stage over models' answers by model, the baseline's first. Each
    prompt asks for two bullets. The judge is called in this process."""
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
    """The blocks of one type in what the artifact contributes to the report."""
    chapters = section.pairwise_section(artifact).chapters
    every: list[Block] = [block for chapter in chapters for block in chapter.blocks]
    return [block for block in every if isinstance(block, kind)]


@pytest.fixture
def fish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The base model keeps no constraint, sft one of two, dpo both."""
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
    # Every star is a word: 6 in two bullets, 4 in the other answer of sft, 1 and 2 in base.
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
        "base": "tie",
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
    [note] = result(compared(tmp_path, monkeypatch, answers, control="answers_control"))["notes"]
    assert note.startswith("dpo against control") and "−1.000 [−1.000, −1.000]" in note
    assert "does worse" in note


def test_a_control_that_is_no_answers_stage_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"base": ["Cod."] * 2, "control": ["Cod."] * 2, "dpo": [BULLETS] * 2}
    made = compared(
        tmp_path, monkeypatch, texts, answers=["answers_dpo"], control="answers_control"
    )
    differences = {(d["a"], d["b"]): d["pass_difference"] for d in result(made)["differences"]}
    assert differences == {("dpo", "base"): 1.0, ("dpo", "control"): 1.0}
    assert len(result(made)["notes"]) == 1


class Scripted:
    """Reads its verdict and whether the constraint is kept from the answer: "0.5 kept"."""

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


def test_the_stage_s_seed_draws_every_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [1.0] * 15 + [0.5] * 9 + [0.0] * 23
    kept = [number % 3 == 0 for number in range(47)]
    texts = [f"{v} {'kept' if k else 'broken'}" for v, k in zip(verdicts, kept, strict=True)]
    for values in (verdicts, kept):
        assert bootstrap(values, 7) != bootstrap(values, 0), "the seed must show in the interval"
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
    assert set(written) == {"baseline", "judge", "control", "models", "differences", "notes"}
    assert set(written["models"]["dpo"]) == {
        *("win_rate", "low", "high", "wins", "ties", "losses", "flips", "parse_failures"),
        *("prompts", "pass_rate", "pass_low", "pass_high", "on_topic", "words", "length_bias"),
        *("by_constraint", "left_out"),
    }


def test_prompts_that_the_win_rate_leaves_out_are_counted_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model dpo answers three of four prompts; one reply of the judge is unparsable."""
    answers = {"base": ["0 kept"] * 4, "dpo": ["? kept", "1 kept", "1 kept"]}
    made = compared(tmp_path, monkeypatch, answers, Scripted())
    figures = result(made)["models"]["dpo"]
    assert (figures["win_rate"], figures["left_out"], figures["parse_failures"]) == (1.0, 2, 1)
    table = blocks(made, Table)[0]
    assert [column.heading for column in table.columns[:3]] == ["Model", "Left out", "Win rate"]
    assert [row[1] for row in table.rows] == [None, 2]
    headline = section.pairwise_section(made).headline
    assert (
        "on 2 held-out prompts (of 4, 1 not answered by both and 1 without a readable verdict)"
    ) in headline


def test_no_readable_verdict_is_reported_as_that(
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


def test_models_that_only_answer_nothing_have_no_win_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compared(tmp_path, monkeypatch, {"base": [""] * 3, "dpo": [""] * 3})
    assert result(made)["models"]["dpo"]["win_rate"] is None


def test_unparsable_verdicts_are_of_no_use() -> None:
    unreadable = {"verdict": None, "reason": "unparsable: judge: 'hm'"}
    assert [str(pairwise._flaw(unreadable)), pairwise._flaw({"verdict": 0.5, "reason": ""})] == [
        "unparsable: judge: 'hm'",
        None,
    ]
    assert pairwise._flaw({"verdict": None, "reason": figures.BOTH_EMPTY}) is None


def test_a_new_figure_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
