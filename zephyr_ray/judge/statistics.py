"""Computes intervals for win rates and pass rates by bootstrap over prompts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

CHUNK = 4_000_000
"""Maximum random draws in memory at once."""


def bootstrap(
    values: ArrayLike, seed: int, n: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """Computes the mean of one value per prompt and its interval: (mean, low, high).

    Percentile bootstrap: prompts are drawn with replacement `n` times, and the interval holds the
    middle `level` of the means (Efron and Tibshirani 1993, chapter 13). One value, or equal values,
    give an interval of zero width, which means unknown rather than certain. Raises ValueError if
    there is no value.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("bootstrap needs one value per prompt, and at least one prompt")
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // array.size)
    means = np.concatenate(
        [
            array[rng.integers(array.size, size=(min(step, n - i), array.size))].mean(axis=1)
            for i in range(0, n, step)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(array.mean()), float(low), float(high)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int) -> tuple[float, float, float]:
    """Computes the mean of a - b over the same prompts and its interval: (mean, low, high).

    Pairing cancels the difficulty of each prompt, so it separates two models better than their own
    intervals do. Raises ValueError if the two sides differ in length.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError("a paired difference needs the same prompts on both sides")
    return bootstrap(first - second, seed)


def length_bias(
    verdicts: Sequence[float], len_a: Sequence[int], len_b: Sequence[int]
) -> float | None:
    """Computes the share of decided verdicts (1: a wins, 0: b wins) that the longer answer won.

    0.5 is no preference for length. Ties (0.5) and pairs of equal length are left out. Returns None
    if nothing is left.
    """
    won = [
        (verdict > 0.5) == (a > b)
        for verdict, a, b in zip(verdicts, len_a, len_b, strict=True)
        if verdict != 0.5 and a != b
    ]
    return sum(won) / len(won) if won else None
