"""Tests ratings: by hand, against evalica, and by simulation of judges whose ratings are known."""

import math
from itertools import combinations

import evalica
import numpy as np
import pytest

from zephyr_ray.judge.bradley_terry import (
    ANCHOR,
    LOST,
    POINTS,
    UNLINKED,
    UNREAD,
    WON,
    Comparison,
    Ratings,
    rate,
)
from zephyr_ray.judge.style import style_difference

SEEDS = 250
"""Number of simulated data sets per test."""
THREE_TO_ONE = 400 * math.log10(3)
"""Rating difference if one model wins three quarters of the comparisons: 190.8 points."""


def verdicts(first: str, second: str, *shares: float, start: int = 0) -> list[Comparison]:
    """Returns a comparison per share, each on its own prompt."""
    return [Comparison(first, second, s, f"p{n}") for n, s in enumerate(shares, start)]


def swap(comparison: Comparison) -> Comparison:
    """Returns the same verdict with the sides exchanged."""
    style = tuple(-value for value in comparison.style)
    return Comparison(
        comparison.second, comparison.first, 1 - comparison.share, comparison.prompt, style
    )


@pytest.mark.parametrize(
    "shares", [(1, 1, 1, 0), (1, 1, 0.5, 0.5), (0.9, 0.6, 0.8, 0.7), (1, 0.75, 0.5, 0.75)]
)
def test_a_rating_is_the_log_odds_of_the_mean_share(shares: tuple[float, ...]) -> None:
    ratings = rate(verdicts("b", "a", *shares), ["a", "b"])
    assert ratings.anchor == "a"
    assert ratings.rating("a") == (ANCHOR, None, None)
    assert ratings.rating("b")[0] == pytest.approx(ANCHOR + THREE_TO_ONE)


def test_an_interval_by_hand() -> None:
    # p = 0.75, information 4 × 0.1875 = 0.75, squared residuals 3 × 0.0625 + 0.5625 = 0.75, and
    # 4 clusters: the variance of the log-odds is 4/3 × 0.75 / 0.75². Student's t with 3 degrees of
    # freedom is 3.182446 at 97.5%.
    half = 3.182446 * math.sqrt(16 / 9) * POINTS
    _, low, high = rate(verdicts("b", "a", 1, 1, 1, 0), ["a", "b"]).difference("b", "a")
    assert (low, high) == pytest.approx((THREE_TO_ONE - half, THREE_TO_ONE + half), abs=1e-3)


def test_repeated_judgements_of_a_prompt_add_no_certainty() -> None:
    once = verdicts("b", "a", 1, 1, 1, 0, 0.5)
    single, double = (rate(c, ["a", "b"]) for c in (once, [*once, *map(swap, once)]))
    assert double.difference("b", "a") == pytest.approx(single.difference("b", "a"))


def test_models_are_rated_through_a_common_opponent() -> None:
    comparisons = [*verdicts("c", "b", 1, 1, 1, 0), *verdicts("b", "a", 1, 0, 1, 1)]
    ratings = rate(comparisons, ["a", "b", "c"])
    assert ratings.difference("c", "a")[0] == pytest.approx(2 * THREE_TO_ONE)
    assert ratings.difference("a", "c")[0] == pytest.approx(-2 * THREE_TO_ONE)
    assert [ratings.rank(model)[0] for model in ("a", "b", "c")] == [3, 2, 1]


def test_ranks_are_those_that_the_differences_allow() -> None:
    # b and c cannot be told apart; both are better than a.
    comparisons = [
        *verdicts("b", "a", *[1, 1, 1, 0] * 20),
        *verdicts("c", "a", *[1, 1, 1, 0] * 20, 1, start=100),
        *verdicts("c", "b", *[1, 0] * 4, start=200),
    ]
    ratings = rate(comparisons, ["a", "b", "c"])
    assert {m: ratings.rank(m) for m in "abc"} == {"a": (3, 3, 3), "b": (2, 1, 2), "c": (1, 1, 2)}


MIXED = [*verdicts("b", "a", 1, 0, 1), *verdicts("c", "b", 1, 0, 0.5), *verdicts("a", "c", 1, 0)]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (verdicts("x", "a", 1, 1) + verdicts("x", "b", 1), WON),
        (verdicts("a", "x", 1, 1), LOST),
        (verdicts("y", "a", 1) + verdicts("x", "y", 1), WON),
        (verdicts("y", "a", 1) + verdicts("y", "x", 1), UNLINKED),
        (verdicts("x", "y", 1, 0), UNLINKED),
        ([], UNREAD),
    ],
)
def test_a_model_without_a_finite_difference_has_no_rating(
    more: list[Comparison], reason: str
) -> None:
    known = rate(MIXED, ["a", "b", "c"])
    ratings = rate([*MIXED, *more], ["a", "b", "c", "x", "y"])
    assert ratings.rated == ("a", "b", "c")
    assert ratings.unrated["x"] == reason
    assert ratings.rating("b") == pytest.approx(known.rating("b"))


def test_the_anchor_is_in_the_largest_group() -> None:
    ratings = rate([*MIXED, *verdicts("a", "base", 1, 1)], ["base", "a", "b", "c"])
    assert (ratings.anchor, ratings.unrated) == ("a", {"base": LOST})
    ratings = rate(verdicts("b", "base", 1) + verdicts("c", "base", 1), ["base", "b", "c"])
    assert (ratings.rated, ratings.rank("base")) == (("base",), (1, 1, 1))
    assert ratings.unrated == {"b": WON, "c": WON}


def test_nothing_to_compare() -> None:
    assert rate([], ["a"]).rating("a") == (ANCHOR, None, None)
    assert rate([], ["a", "b"]).unrated == {"b": UNREAD}


@pytest.mark.parametrize(
    "comparisons",
    [
        verdicts("b", "a", *[0.5] * 9),  # the same outcome on every prompt
        [Comparison("b", "a", share, "p") for share in (1, 0, 1)],  # one prompt
    ],
)
def test_an_interval_that_cannot_be_estimated_is_none(comparisons: list[Comparison]) -> None:
    value, low, high = rate(comparisons, ["a", "b"]).rating("b")
    assert math.isfinite(value) and (low, high) == (None, None)


def test_as_many_prompts_as_parameters_give_no_interval() -> None:
    comparisons = [
        *verdicts("b", "a", 1, 0),
        *verdicts("c", "a", 0.6, 1),
        *verdicts("b", "c", 0, 0.8),
    ]
    assert rate(comparisons, ["a", "b", "c"]).rating("b")[1] is None


def test_ratings_equal_those_of_evalica() -> None:
    rng = np.random.default_rng(5)
    models = [f"m{n}" for n in range(6)]
    strengths = dict(zip(models, rng.normal(size=6), strict=True))
    sides = [rng.permutation(models)[:2] for _ in range(400)]
    shares = [
        0.5
        if rng.random() < 0.2
        else float(rng.random() < 1 / (1 + math.exp(strengths[b] - strengths[a])))
        for a, b in sides
    ]
    winner = {1: evalica.Winner.X, 0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    scores = evalica.bradley_terry(
        [str(a) for a, _ in sides],
        [str(b) for _, b in sides],
        [winner[share] for share in shares],
        tolerance=1e-12,
        limit=100_000,
    ).scores
    comparisons = [
        Comparison(str(a), str(b), share, f"p{n}")
        for n, ((a, b), share) in enumerate(zip(sides, shares, strict=True))
    ]
    ratings = rate(comparisons, models)
    for a, b in combinations(models, 2):
        expected = POINTS * math.log(scores[a] / scores[b])
        assert ratings.difference(a, b)[0] == pytest.approx(expected, abs=1e-3)


def simulated(rng: np.random.Generator, prompts: int) -> list[Comparison]:
    """Returns verdicts of three judges on four models; on 70% of the prompts they share one."""
    logits = np.array(list(TRUTH.values()))
    comparisons = []
    for prompt in range(prompts):
        a, b = rng.permutation(len(TRUTH))[:2]
        chance = 1 / (1 + math.exp(logits[b] - logits[a]))
        common, own = rng.random() < chance, rng.random(3) < chance
        for verdict in np.where(rng.random() < 0.7, common, own):
            names = list(TRUTH)
            comparisons.append(Comparison(names[a], names[b], float(verdict), f"p{prompt}"))
    return comparisons


TRUTH = {"a": 0.0, "b": 0.4, "c": 0.8, "d": -0.3}
"""True strengths of the models, in log-odds."""


def coverage(samples: list[Ratings]) -> float:
    """Returns the share of intervals, over all pairs of models, that hold the true difference."""
    held = []
    for ratings in samples:
        for a, b in combinations(TRUTH, 2):
            _, low, high = ratings.difference(a, b)
            assert low is not None and high is not None
            held.append(low <= POINTS * (TRUTH[a] - TRUTH[b]) <= high)
    return sum(held) / len(held)


def test_intervals_cover_known_ratings_only_if_clustered_by_prompt() -> None:
    rng = np.random.default_rng(3)
    samples = [simulated(rng, prompts=150) for _ in range(SEEDS)]
    assert 0.93 <= coverage([rate(sample, list(TRUTH)) for sample in samples]) <= 0.97
    by_row = [
        [Comparison(c.first, c.second, c.share, f"{n}") for n, c in enumerate(sample)]
        for sample in samples
    ]
    assert coverage([rate(sample, list(TRUTH)) for sample in by_row]) < 0.87


def styled(rng: np.random.Generator, prompts: int, effect: float) -> list[Comparison]:
    """Returns verdicts of a judge who likes length, on a model whose answers are as good as the
    baseline's but longer."""
    comparisons = []
    for prompt in range(prompts):
        length = rng.normal(0.3, 0.3)
        share = float(rng.random() < 1 / (1 + math.exp(-effect * length)))
        style = (length, 0.0, rng.normal(0, 0.01), rng.normal(0, 0.01))
        comparisons.append(Comparison("long", "base", share, f"p{prompt}", style))
    return comparisons


def test_control_removes_a_judge_s_love_of_length() -> None:
    rng = np.random.default_rng(8)
    plain, held, effects = 0, 0, []
    for _ in range(SEEDS):
        comparisons = styled(rng, prompts=200, effect=4.0)
        without = [Comparison(c.first, c.second, c.share, c.prompt) for c in comparisons]
        _, low, _ = rate(without, ["base", "long"]).rating("long")
        plain += low is not None and low > ANCHOR
        controlled = rate(comparisons, ["base", "long"])
        _, low, high = controlled.rating("long")
        held += low is not None and high is not None and low <= ANCHOR <= high
        effects.append(controlled.style_effects()[0][0])
    assert plain == SEEDS
    assert 0.93 <= held / SEEDS <= 0.97
    # The root mean square of the differences in length is √(0.3² + 0.3²).
    assert np.mean(effects) == pytest.approx(4 * math.sqrt(0.18) * POINTS, rel=0.05)


def test_the_order_of_the_sides_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    comparisons = styled(rng, prompts=80, effect=1.0)
    mixed = [swap(c) if rng.random() < 0.5 else c for c in comparisons]
    ratings, swapped = (rate(c, ["base", "long"]) for c in (comparisons, mixed))
    assert swapped.rating("long") == pytest.approx(ratings.rating("long"))
    assert swapped.style_effects()[0] == pytest.approx(ratings.style_effects()[0])


def test_a_style_that_no_answer_has_has_no_effect() -> None:
    comparisons = styled(np.random.default_rng(0), prompts=50, effect=1.0)
    without = [
        Comparison(c.first, c.second, c.share, c.prompt, (c.style[0], *c.style[2:]))
        for c in comparisons
    ]
    full, short = (rate(c, ["base", "long"]) for c in (comparisons, without))
    assert full.style_effects()[1] == (0.0, None, None)
    assert full.rating("long")[0] == pytest.approx(short.rating("long")[0])


@pytest.mark.parametrize(
    ("styles", "fault"),
    [
        ([(0.5,), (0.1,), (-0.2,), (-0.4,)], "explain every verdict"),
        ([(0.5,), (0.0,), (0.0,), (-0.4,)], "explain every verdict"),  # except for ties in style
        ([(0.2,), (0.2,), (0.2,), (0.2,)], "depend on each other or on the models"),
    ],
)
def test_a_style_whose_effect_is_unknown_is_refused(
    styles: list[tuple[float, ...]], fault: str
) -> None:
    shares = (1.0, 1.0, 0.0, 0.0)
    comparisons = [
        Comparison("b", "a", share, f"p{n}", style)
        for n, (share, style) in enumerate(zip(shares, styles, strict=True))
    ]
    with pytest.raises(ValueError, match=fault):
        rate(comparisons, ["a", "b"])


def test_a_tie_that_style_does_not_explain_makes_its_effect_finite() -> None:
    # Without the tie, style alone separates wins from losses, and its effect would be infinite.
    shares, styles = (1.0, 1.0, 0.5, 0.0, 0.0), (0.5, 0.1, 0.3, -0.2, -0.4)
    comparisons = [
        Comparison("b", "a", share, f"p{n}", (style,))
        for n, (share, style) in enumerate(zip(shares, styles, strict=True))
    ]
    ratings = rate(comparisons, ["a", "b"])
    assert abs(ratings.style_effects()[0][0]) < 10_000
    with pytest.raises(ValueError, match="explain every verdict"):
        rate([c for c in comparisons if c.share != 0.5], ["a", "b"])


def test_differences_in_style_by_hand() -> None:
    first = "# Fish\n\n- **cod**\n2. __eel__\n\n```\n# not a header\n- **no item**\n```\n"
    second = "A cod, a #1 fish - or 2*3 eels."
    length, headers, lists, bold = style_difference(first, second)
    total = len(first) + len(second)
    assert length == pytest.approx((len(first) - len(second)) / total)
    assert (headers, lists, bold) == pytest.approx([n / len(first) for n in (1, 2, 2)])
    assert style_difference(second, first) == pytest.approx((-length, -headers, -lists, -bold))
    assert style_difference("", "") == (0, 0, 0, 0)
    assert style_difference("", "**a**")[3] == pytest.approx(-1 / 5)
