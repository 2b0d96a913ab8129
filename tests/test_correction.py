"""Tests corrections of a judge by people's labels: against hand calculations, the authors' package
and numbers, and simulated judges whose bias is known."""

import numpy as np
import pytest

from zephyr_ray.judge.correction import prediction_powered, share, two_parameter

SIMULATIONS = 2000


def test_prediction_powered_by_hand() -> None:
    # Four verdicts on held-out prompts; four labelled pairs, of which the judge gets one wrong.
    estimate = prediction_powered([1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 1])
    assert estimate is not None
    # Cov(Y, f) = mean(Yf) - 1/2 * 3/4 = 1/8. Var(f) of all 8 verdicts: 8/7 * 3/4 * 1/4 = 3/14.
    # λ = 1/8 / ((1 + 4/4) * 3/14) = 7/24. θ = λ * 3/4 + (1/2 - λ * 3/4).
    assert estimate.weight == pytest.approx(7 / 24)
    assert estimate.rate == pytest.approx(0.5)
    # Var(λf)/N = λ² * 3/16 / 4. Y - λf is 1 - λ, 0, -λ, 1 - λ.
    rest = np.array([17, 0, -7, 17]) / 24
    variance = (7 / 24) ** 2 * 3 / 64 + rest.var() / 4
    assert estimate.high - estimate.low == pytest.approx(2 * 1.959964 * variance**0.5)


@pytest.mark.parametrize("agreement", [0.1, 0.5, 0.9])
def test_prediction_powered_equals_the_authors_package(agreement: float) -> None:
    from ppi_py import ppi_mean_ci, ppi_mean_pointestimate

    rng = np.random.default_rng(5)
    labels = rng.choice([0, 0.5, 1], size=80, p=[0.35, 0.2, 0.45])
    judged = np.where(rng.random(80) < agreement, labels, 1 - labels)
    verdicts = rng.choice([0, 0.5, 1], size=300, p=[0.3, 0.1, 0.6])
    estimate = prediction_powered(verdicts, judged, labels)
    assert estimate is not None
    assert estimate.rate == pytest.approx(ppi_mean_pointestimate(labels, judged, verdicts).item())
    low, high = ppi_mean_ci(labels, judged, verdicts, alpha=0.05)
    assert (estimate.low, estimate.high) == pytest.approx((low.item(), high.item()))


def test_the_weight_has_the_smallest_variance() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=4000).astype(float)
    judged = np.where(rng.random(4000) < 0.8, labels, 1 - labels)
    # Both samples have the same distribution, because the variance is estimated from both.
    verdicts = np.tile(judged, 2)
    weights = np.linspace(0, 1, 1001)[:, None]
    variance = weights[:, 0] ** 2 * verdicts.var() / 8000
    variance = variance + (labels - weights * judged).var(axis=1) / 4000
    estimate = prediction_powered(verdicts, judged, labels)
    assert estimate is not None
    assert estimate.weight == pytest.approx(weights[variance.argmin(), 0], abs=0.002)


def test_a_judge_with_constant_verdicts_has_no_weight() -> None:
    estimate = prediction_powered([1] * 9, [1] * 4, [1, 0, 0, 0])
    assert estimate is not None
    assert (estimate.weight, estimate.rate) == (0, 0.25)


@pytest.mark.parametrize(("verdicts", "labels"), [([1, 0], [1]), ([1], [1, 0])])
def test_one_value_has_no_variance(verdicts: list[float], labels: list[float]) -> None:
    assert prediction_powered(verdicts, labels, labels) is None


def verdicts_of(rate: float, count: int) -> list[float]:
    wins = round(rate * count)
    return [1.0] * wins + [0.0] * (count - wins)


def test_two_parameters_by_hand() -> None:
    """The example of the authors' package: p = 0.4, q0 = 0.7, q1 = 0.9."""
    correction = two_parameter(verdicts_of(0.4, 1000), verdicts_of(0.9, 200), verdicts_of(0.3, 200))
    assert (correction.q0, correction.q1) == (pytest.approx(0.7), 0.9)
    assert correction.corrected is not None
    assert correction.corrected.rate == pytest.approx((0.4 + 0.7 - 1) / (0.7 + 0.9 - 1))
    # With pseudo-verdicts: p = (400 + z²/2) / (1000 + z²), q0 = 141/202, q1 = 181/202.
    z2 = 1.959964**2
    p, q0, q1 = (400 + z2 / 2) / (1000 + z2), 141 / 202, 181 / 202
    v, v0, v1 = p * (1 - p) / (1000 + z2), q0 * (1 - q0) / 202, q1 * (1 - q1) / 202
    theta = (p + q0 - 1) / (q0 + q1 - 1)
    middle = theta + 2 * z2 * (theta * v1 - (1 - theta) * v0)
    error = (v + (1 - theta) ** 2 * v0 + theta**2 * v1) ** 0.5 / (q0 + q1 - 1)
    ends = (middle - z2**0.5 * error, middle + z2**0.5 * error)
    assert (correction.corrected.low, correction.corrected.high) == pytest.approx(ends)


def test_a_perfect_judge_is_not_corrected() -> None:
    correction = two_parameter(verdicts_of(0.7, 100), [1.0] * 30, [0.0] * 30)
    assert (correction.q0, correction.q1) == (1, 1)
    assert correction.corrected is not None and correction.corrected.rate == pytest.approx(0.7)


def test_ties_of_the_judge_count_one_half() -> None:
    # q1 = (1 + 1 + 0.5) / 3 and q0 = (1 + 0.5) / 2, ten times each.
    correction = two_parameter([1, 0.5, 0.5, 1] * 9, [1, 1, 0.5] * 10, [0, 0.5] * 10)
    assert (correction.q0, correction.q1) == (0.75, pytest.approx(5 / 6))
    assert correction.corrected is not None
    rate = (0.75 + 0.75 - 1) / (0.75 + 5 / 6 - 1)
    assert correction.corrected.rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("won", "lost"),
    [
        ([1.0] * 90, [1.0] * 60),  # always for the model
        ([0.0, 1.0] * 40, [0.0, 1.0] * 40),  # by a coin
        ([0.0] * 60, [1.0] * 60),  # always against people
        ([1.0] * 3, [0.0] * 2),  # five correct verdicts, which may be chance
        ([1.0] * 60, []),
        ([], [0.0] * 60),
    ],
)
def test_no_correction_without_agreement_beyond_chance(won: list[float], lost: list[float]) -> None:
    assert two_parameter(verdicts_of(0.7, 500), won, lost).corrected is None


def test_the_interval_of_a_share() -> None:
    rate = share([1] * 8 + [0] * 2)
    assert rate is not None
    # By hand: (8 + z²/2) / (10 + z²) = 0.7167, and z √(0.7167 · 0.2833 / (10 + z²)) = 0.2374.
    assert (rate.rate, rate.low, rate.high) == pytest.approx((0.8, 0.4794, 0.9541), abs=1e-4)
    unanimous = share([1] * 10)
    assert unanimous is not None and unanimous.low < 0.8 and unanimous.high == 1
    assert share([]) is None


@pytest.fixture(scope="module")
def covered() -> dict[str, float]:
    """Returns the share of simulations whose interval contains the truth. People prefer the model
    in 60 % of pairs; the judge agrees in 90 % of these and in 60 % of the others, and so prefers
    the model in 70 %."""
    rng = np.random.default_rng(11)
    truth, q1, q0, prompts, labels = 0.6, 0.9, 0.6, 500, 150
    people = rng.random((SIMULATIONS, prompts + labels)) < truth
    model_wins = rng.random(people.shape) < np.where(people, q1, 1 - q0)
    hits = {"judge": 0, "prediction_powered": 0, "two_parameter": 0}
    for wins, judged in zip(people[:, prompts:], model_wins.astype(float), strict=True):
        verdicts, known = judged[:prompts], judged[prompts:]
        intervals = {
            "judge": share(verdicts),
            "prediction_powered": prediction_powered(verdicts, known, wins),
            "two_parameter": two_parameter(verdicts, known[wins], known[~wins]).corrected,
        }
        for name, rate in intervals.items():
            hits[name] += rate is not None and rate.low <= truth <= rate.high
    return {name: count / SIMULATIONS for name, count in hits.items()}


def test_the_interval_of_a_biased_judge_misses_the_truth(covered: dict[str, float]) -> None:
    assert covered["judge"] < 0.02


@pytest.mark.parametrize("name", ["prediction_powered", "two_parameter"])
def test_a_corrected_interval_covers_the_truth_at_its_nominal_rate(
    name: str, covered: dict[str, float]
) -> None:
    assert 0.93 <= covered[name] <= 0.97
