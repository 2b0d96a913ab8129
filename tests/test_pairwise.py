"""The figures of a comparison, by hand on rows few enough to count."""

from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.pairwise import Pairwise, _control_note, pass_difference, passed, summary
from zephyr_ray.judge.statistics import bootstrap
from zephyr_ray.manifest import Manifest
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


def test_no_verdict_at_all_says_that_nothing_is_known() -> None:
    figures = summary([row(1, None, None, [1, 1])], seed=0)
    assert (figures["win_rate"], figures["low"], figures["high"]) == (0.5, 0.0, 1.0)
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
    ("low", "high", "says"),
    [(0.01, 0.2, "adds to what"), (-0.2, -0.01, "does harm"), (-0.1, 0.1, "adds nothing")],
)
def test_the_control_note_follows_the_interval(low: float, high: float, says: str) -> None:
    found = {"a": "dpo", "b": "control", "pass_difference": 0.05, "low": low, "high": high}
    other = {"a": "dpo", "b": "base", "pass_difference": 0.5, "low": 0.4, "high": 0.6}
    note = _control_note([other, found], "dpo", "control")
    assert says in note
    assert f"+0.050 [{low:+.3f}, {high:+.3f}]" in note


def test_the_control_note_without_figures_says_so() -> None:
    assert "not isolated" in _control_note([], "dpo", "control")
