"""Bootstrap intervals against closed forms, a reference implementation and simulated coverage."""

import numpy as np
import pytest

from zephyr_ray.judge.statistics import bootstrap, length_bias, paired_difference


def test_interval_is_the_normal_one_on_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    mean, low, high = bootstrap(values, seed=1)
    half = 1.959964 * values.std() / np.sqrt(2000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_two_prompts_can_be_worked_out_by_hand() -> None:
    # Means of two draws from {0, 1}: 0 and 1 each with chance 1/4, so 95% reaches both ends,
    # and the middle 40% is 0.5 alone.
    assert bootstrap([0, 1], seed=0) == (0.5, 0.0, 1.0)
    assert bootstrap([0, 1], seed=0, level=0.4) == (0.5, 0.5, 0.5)


def test_same_as_scipy() -> None:
    from scipy.stats import bootstrap as reference

    values = np.random.default_rng(3).choice([0.0, 0.5, 1.0], 240, p=[0.3, 0.2, 0.5])
    _, low, high = bootstrap(values, seed=0)
    expected = reference(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(400):
        _, low, high = bootstrap(rng.binomial(1, 0.6, 200), seed=trial, n=1000)
        hits += low <= 0.6 <= high
    # 0.95 with a binomial spread of 0.011; three of them.
    assert hits / 400 == pytest.approx(0.95, abs=0.033)


def test_higher_level_is_a_wider_interval() -> None:
    values = np.arange(50) % 7
    _, low90, high90 = bootstrap(values, seed=0, level=0.9)
    _, low99, high99 = bootstrap(values, seed=0, level=0.99)
    assert low99 < low90 < high90 < high99


@pytest.mark.parametrize("values", [[1], [0.5] * 30])
def test_one_prompt_or_equal_values_have_no_width(values: list[float]) -> None:
    assert bootstrap(values, seed=0) == (values[0],) * 3


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_drawing_in_chunks_is_the_same_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=300)
    whole = bootstrap(values, seed=0)
    monkeypatch.setattr("zephyr_ray.judge.statistics.CHUNK", 300 * 999)
    assert bootstrap(values, seed=0) == pytest.approx(whole, abs=1e-12)


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap([], seed=0)


def test_pairing_takes_out_how_hard_a_prompt_is() -> None:
    hard = np.random.default_rng(0).normal(0, 10, 200)
    mean, low, high = paired_difference(hard + 1, hard, seed=0)
    assert (mean, low, high) == pytest.approx((1, 1, 1))


def test_paired_difference_has_the_sign_of_a_minus_b() -> None:
    a, b = np.array([1.0] * 70 + [0.0] * 30), np.array([1.0] * 50 + [0.0] * 50)
    mean, low, high = paired_difference(a, b, seed=0)
    assert mean == pytest.approx(0.2)
    # 20 of 100 prompts differ by one: standard deviation 0.4, standard error 0.04.
    assert (low, high) == pytest.approx((0.2 - 0.0784, 0.2 + 0.0784), abs=0.011)


def test_paired_difference_is_drawn_with_its_seed() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 20))
    assert paired_difference(a, b, seed=4) == bootstrap(a - b, seed=4)
    assert paired_difference(a, b, seed=4) != paired_difference(a, b, seed=5)


def test_paired_difference_needs_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([1, 0], [1], seed=0)


def test_length_bias_leaves_out_ties_and_equal_lengths() -> None:
    # Longer wins, longer wins, shorter wins; a tie and an equal pair do not count.
    assert length_bias([1, 0, 1, 0.5, 1], [9, 2, 3, 9, 5], [5, 6, 8, 1, 5]) == pytest.approx(2 / 3)
    assert length_bias([0.5, 1], [3, 4], [1, 4]) is None
