"""Tests the headline of a comparison: which model to ship, and how sure that is."""

from typing import Any

import pytest

from zephyr_ray.judge.length_control import obstacle
from zephyr_ray.judge.wording import headline, length_notes


def figures(rate: float, spread: float = 0.05, **more: Any) -> dict[str, Any]:
    return {
        **{"win_rate": rate, "low": rate - spread, "high": rate + spread},
        **{"prompts": 200, "parse_failures": 0, "asked": 200, "left_out": 0},
        **more,
    }


def controlled(rate: float, spread: float = 0.05) -> dict[str, Any]:
    return {
        "length_controlled": rate,
        "length_controlled_low": rate - spread,
        "length_controlled_high": rate + spread,
    }


def result(models: dict[str, Any], *leads: tuple[str, str, float], **more: Any) -> dict[str, Any]:
    """Returns a comparison's result; each lead is (model, other, win difference), ± 0.04."""
    return {
        **{"baseline": "base", "control": None, "differences": []},
        "models": {"base": {"prompts": 200}, **models},
        "win_differences": [
            {"a": a, "b": b, "win_difference": by, "low": by - 0.04, "high": by + 0.04}
            for a, b, by in leads
        ],
        **more,
    }


def test_the_model_with_the_highest_win_rate_is_shipped() -> None:
    models = {"sft": figures(0.8, **controlled(0.75)), "dpo": figures(0.7)}
    assert headline(result(models, ("sft", "dpo", 0.1))) == (
        "Ship sft: it has a win rate of 0.80 [0.75, 0.85] against base on 200 held-out prompts, "
        "0.75 [0.70, 0.80] at equal length; it beats dpo, the next, by +0.100 [+0.060, +0.140]."
    )


def test_among_equal_win_rates_the_last_model_is_shipped() -> None:
    assert headline(result({"sft": figures(0.8), "dpo": figures(0.8)})).startswith("Ship dpo:")


def test_the_control_may_be_the_best_model() -> None:
    models = {"dpo": figures(0.7), "control": figures(0.8)}
    difference = {"a": "dpo", "b": "control", "pass_difference": -0.1, "low": -0.2, "high": -0.05}
    text = headline(result(models, control="control", differences=[difference]))
    assert text.startswith("Ship control:")
    assert "Against control, the DPO term of dpo hurts: checks passed −0.100" in text


def test_the_win_rate_decides_what_the_dpo_term_does() -> None:
    """The difference in checks passed includes 0."""
    models = {"dpo": figures(0.8), "control": figures(0.7)}
    difference = {"a": "dpo", "b": "control", "pass_difference": 0.02, "low": -0.1, "high": 0.1}
    more: dict[str, Any] = {"control": "control", "differences": [difference]}
    won = result(models, ("dpo", "control", 0.1), **more)
    assert "the DPO term helps: win rate +0.100 [+0.060, +0.140]" in headline(won)
    lost = result({"dpo": figures(0.7), "control": figures(0.8)}, ("control", "dpo", 0.1), **more)
    assert "the DPO term of dpo hurts: win rate −0.100 [−0.140, −0.060]" in headline(lost)


def test_a_control_that_is_the_baseline_is_compared_by_the_win_rate() -> None:
    models = {"base": figures(0.5), "dpo": figures(0.6)}
    text = headline(result(models, control="base"))
    assert "Against base, the DPO term helps: win rate +0.100 [+0.050, +0.150]" in text


def test_the_next_model_may_have_the_same_win_rate() -> None:
    models = {"sft": figures(0.7), "dpo": figures(0.8), "control": figures(0.8)}
    leads = [("control", "dpo", 0.0), ("control", "sft", 0.1), ("dpo", "sft", 0.1)]
    text = headline(result(models, *leads, control="control"))
    assert text.startswith("Ship dpo:")
    assert "it is not clearly better than control (+0.000 [−0.040, +0.040])" in text


def test_models_that_are_not_clearly_worse_are_named() -> None:
    models = {"a": figures(0.7), "b": figures(0.71), "c": figures(0.72)}
    text = headline(result(models, ("c", "a", 0.02), ("c", "b", 0.01)))
    assert "; it is not clearly better than b (+0.010 [−0.030, +0.050]), nor than 1 more." in text


def test_no_model_is_shipped_if_none_is_clearly_better() -> None:
    text = headline(result({"dpo": figures(0.52)}))
    assert text.startswith("No model is clearly better than base: the best, dpo, has a win rate")
    assert "cannot be distinguished from no difference (0.50)" in text


@pytest.mark.parametrize(
    ("rate", "says"),
    [
        (0.62, "Ship dpo: it has"),
        (0.54, "dpo leads, but perhaps only by the length of its answers: it has"),
        (0.3, "dpo leads, but perhaps only by the length of its answers: it has"),
    ],
)
def test_a_lead_that_length_explains_is_no_reason_to_ship(rate: float, says: str) -> None:
    text = headline(result({"dpo": figures(0.7, **controlled(rate))}))
    assert text.startswith(says)
    assert ("AlpacaEval warns" in text) == (rate == 0.3)


def test_prompts_without_a_verdict_are_not_in_the_rate() -> None:
    """Two of 10 prompts were not answered by both models, and one has an unparsable reply."""
    counts = {"prompts": 10, "asked": 10, "left_out": 3, "parse_failures": 1}
    assert (
        "on 7 held-out prompts (of 10, 2 not answered by both and 1 without a readable verdict)"
    ) in headline(result({"dpo": figures(0.7, **counts)}))


def test_a_headline_has_at_most_two_sentences() -> None:
    passing = {"pass_rate": 0.5, "words": 20.0}
    difference = {"a": "dpo", "b": "control", "pass_difference": 0.1, "low": 0.05, "high": 0.2}
    text = headline(
        result(
            {
                "base": figures(0.5, **passing),
                "dpo": figures(0.7, **passing, **controlled(0.68)),
                "control": figures(0.6, **passing),
            },
            ("dpo", "control", 0.1),
            control="control",
            differences=[difference],
        )
    )
    assert text.count(". ") == 1 and text.endswith(".")


def test_notes_say_what_length_control_does() -> None:
    models = {
        "near": figures(0.7, **controlled(0.65)),
        "far": figures(0.7, **controlled(0.3)),
        "none": figures(1.0, length_control_obstacle="every verdict is a win"),
        "old": figures(0.7),
    }
    far, none = length_notes(result(models))
    assert far.startswith("Warning: length control moves the win rate of far from 0.70 to 0.30.")
    assert none == "none has no win rate at equal length: every verdict is a win."


def test_few_prompts_choose_no_model_however_narrow_the_interval() -> None:
    few = figures(1.0, spread=0, asked=3, prompts=3)
    assert headline(result({"dpo": few})).startswith(
        "Too few prompts to choose a model (below 30): the best, dpo, has a win rate of "
        "1.00 [1.00, 1.00] against base on 3 held-out prompts"
    )
    one = figures(0.0, spread=0, asked=1, prompts=1)
    assert "on 1 held-out prompt." in headline(result({"dpo": one}))


def test_a_win_that_length_alone_may_explain_is_no_reason_to_ship() -> None:
    for lengths in ([1, 2, 3, -1, -2], [1, 2, 3, 4, 5], [-1, -2, -3, -4, -5]):
        reason = obstacle(6 * [1, 1, 1, 0, 0], 6 * lengths, list(range(30)))
        text = headline(result({"dpo": figures(0.8, length_control_obstacle=reason)}))
        assert text.startswith("dpo leads, but perhaps only by the length of its answers:"), reason


def test_a_win_at_any_length_is_a_reason_to_ship() -> None:
    reason = obstacle(30 * [1], 15 * [1, -1], list(range(30)))
    text = headline(result({"dpo": figures(1.0, spread=0, length_control_obstacle=reason)}))
    assert reason == "every verdict is a win"
    assert text.startswith("Ship dpo:")
