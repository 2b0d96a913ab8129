"""Tests intervals and errors against closed forms, published formulas and simulated coverage."""

import warnings
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr_ray.judge.statistics import (
    bootstrap,
    clustered_error,
    length_bias,
    paired_difference,
)


def test_interval_is_the_normal_one_on_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    mean, low, high = bootstrap(values, seed=1)
    half = 1.959964 * values.std() / np.sqrt(2000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_interval_of_two_prompts_by_hand() -> None:
    # Means of two draws from {0, 1}: 0 and 1 have probability 1/4 each, so 95% of the means
    # reach both ends, and the middle 40% are all 0.5.
    assert bootstrap([0, 1], seed=0) == (0.5, 0.0, 1.0)
    assert bootstrap([0, 1], seed=0, level=0.4) == (0.5, 0.5, 0.5)


def by_the_book(values: np.ndarray, draws: int = 20_000) -> tuple[float, float]:
    """Returns the BCa interval of a mean (Efron and Tibshirani 1993, equations 14.9 to 14.15)."""
    rng, normal = np.random.default_rng(99), NormalDist()
    means = np.sort(values[rng.integers(values.size, size=(draws, values.size))].mean(axis=1))
    below = ((means < values.mean()).mean() + (means <= values.mean()).mean()) / 2
    bias = normal.inv_cdf(below)
    left_out = (values.sum() - values) / (values.size - 1)
    deviations = left_out.mean() - left_out
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    ends = []
    for level in (0.025, 0.975):
        z = bias + normal.inv_cdf(level)
        ends.append(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z))))
    return ends[0], ends[1]


def test_same_as_the_book() -> None:
    values = np.random.default_rng(3).exponential(size=40)
    _, low, high = bootstrap(values, seed=0)
    assert (low, high) == pytest.approx(by_the_book(values), abs=0.02)
    # The sample is skewed, so the percentile interval differs.
    draws = np.random.default_rng(1).integers(40, size=(20_000, 40))
    percentile = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    assert (low, high) != pytest.approx(percentile, abs=0.02)


def both_orders(prompts: int, datasets: int, seed: int) -> np.ndarray:
    """Returns verdicts by data set, prompt and order. Prompts differ in how often the model wins,
    0.6 on average, so the two verdicts on one prompt are correlated (0.5)."""
    rng = np.random.default_rng(seed)
    chances = rng.beta(0.6, 0.4, (datasets, prompts, 1))
    return (rng.random((datasets, prompts, 2)) < chances).astype(float)


def test_errors_by_prompt_cover_the_truth_and_errors_by_row_do_not() -> None:
    verdicts = both_orders(400, 2000, seed=5)
    prompts = np.repeat(np.arange(400), 2)
    means = verdicts.mean(axis=(1, 2))
    by_prompt = np.array([clustered_error(one.ravel(), prompts) for one in verdicts])
    by_row = verdicts.reshape(2000, -1).std(axis=1) / np.sqrt(800)
    covered = [(abs(means - 0.6) <= 1.96 * error).mean() for error in (by_prompt, by_row)]
    assert 0.93 <= covered[0] <= 0.97
    assert covered[1] < 0.92


def test_bootstrap_by_prompt_covers_the_truth_and_by_row_does_not() -> None:
    prompts = np.repeat(np.arange(100), 2)
    hits = {"prompt": 0, "row": 0}
    for seed, verdicts in enumerate(both_orders(100, 500, seed=6)):
        for name, clusters in (("prompt", prompts), ("row", None)):
            _, low, high = bootstrap(verdicts.ravel(), seed, clusters, n=400)
            hits[name] += low <= 0.6 <= high
    assert 0.93 <= hits["prompt"] / 500 <= 0.97
    assert hits["row"] / 500 < 0.92


def test_higher_level_is_a_wider_interval() -> None:
    values = np.arange(50) % 7
    _, low90, high90 = bootstrap(values, seed=0, level=0.9)
    _, low99, high99 = bootstrap(values, seed=0, level=0.99)
    assert low99 < low90 < high90 < high99


@pytest.mark.parametrize("values", [[1], [0.5] * 30])
def test_one_prompt_or_equal_values_have_no_width(values: list[float]) -> None:
    assert bootstrap(values, seed=0) == (values[0],) * 3


def test_prompts_with_equal_means_have_no_width() -> None:
    assert bootstrap([1, 0, 0, 1], 0, ["a", "a", "b", "b"]) == (0.5, 0.5, 0.5)
    rounded = [0.3 - 0.1, 0.2]  # differ by a rounding error
    assert bootstrap(rounded, seed=0)[1:] == (np.mean(rounded),) * 2


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40))
def test_every_list_of_verdicts_has_an_interval_around_its_mean(verdicts: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, low, high = bootstrap(verdicts, seed=0, n=500)
    assert 0 <= low <= mean <= high <= 1


def test_repeated_judgements_of_a_prompt_are_no_more_evidence() -> None:
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 50)
    prompts = [f"p{number}" for number in range(50)]
    once = bootstrap(values, 0, prompts)
    assert bootstrap(np.tile(values, 3), 0, prompts * 3) == pytest.approx(once)
    assert clustered_error(np.tile(values, 3), prompts * 3) == pytest.approx(
        clustered_error(values, prompts)
    )


def test_clustered_error_by_hand() -> None:
    # Deviations from 0.5, summed by prompt: 0, 1, -1; √2 / 6.
    error = clustered_error([1, 0, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c"])
    assert error == pytest.approx(2**0.5 / 6)
    assert clustered_error([1, 1, 0, 0], list("abcd")) == 0.25


def test_a_mean_of_prompts_with_several_judgements_is_that_of_the_judgements() -> None:
    mean, low, high = bootstrap([1, 1, 1, 0, 0, 1], 0, ["a", "a", "a", "b", "c", "d"])
    assert mean == pytest.approx(4 / 6)
    assert low < mean < high


def test_every_value_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="name of its prompt"):
        bootstrap([1, 0], 0, ["a"])


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_drawing_in_chunks_gives_the_same_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=300)
    whole = bootstrap(values, seed=0)
    monkeypatch.setattr("zephyr_ray.judge.statistics.CHUNK", 300 * 999)
    assert bootstrap(values, seed=0) == pytest.approx(whole, abs=1e-12)


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap([], seed=0)


def test_pairing_cancels_the_difficulty_of_prompts() -> None:
    hard = np.random.default_rng(0).normal(0, 10, 200)
    mean, low, high = paired_difference(hard + 1, hard, seed=0)
    assert (mean, low, high) == pytest.approx((1, 1, 1))


def test_paired_difference_has_the_sign_of_a_minus_b() -> None:
    a, b = np.array([1.0] * 70 + [0.0] * 30), np.array([1.0] * 50 + [0.0] * 50)
    mean, low, high = paired_difference(a, b, seed=0)
    assert mean == pytest.approx(0.2)
    # 20 of 100 prompts differ by one: Wilson's interval of a share of 0.2.
    assert (low, high) == pytest.approx((0.1334, 0.2888), abs=0.005)


def test_paired_difference_is_drawn_with_its_seed() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 20))
    assert paired_difference(a, b, seed=4) == bootstrap(a - b, seed=4)
    assert paired_difference(a, b, seed=4) != paired_difference(a, b, seed=5)


def test_paired_difference_needs_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([1, 0], [1], seed=0)


def test_a_fraction_of_a_win_counts_as_a_win_of_the_longer_answer() -> None:
    assert length_bias([0.7, 0.2], [9, 2], [5, 6]) == 1.0


def test_length_bias_leaves_out_ties_and_equal_lengths() -> None:
    # Longer wins, longer wins, shorter wins; a tie and an equal pair do not count.
    assert length_bias([1, 0, 1, 0.5, 1], [9, 2, 3, 9, 5], [5, 6, 8, 1, 5]) == pytest.approx(2 / 3)
    assert length_bias([0.5, 1], [3, 4], [1, 4]) is None
