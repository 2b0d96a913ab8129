"""Intervals for win rates and pass rates, by bootstrap over prompts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

CHUNK = 4_000_000
"""Random draws held in memory at once."""


def bootstrap(
    values: ArrayLike, seed: int, n: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of one value per prompt with its percentile bootstrap interval: (mean, low, high).

    Prompts are drawn with replacement `n` times; the interval holds the middle `level` of the
    means (Efron and Tibshirani 1993, chapter 13). No value at all is a ValueError; one value, or
    equal ones, give an interval of no width, which says that nothing is known, not that all is.
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
    """Mean of a - b over the same prompts, with its interval: (mean, low, high).

    Pairing takes out how hard a prompt is, so two models are compared by this and not by whether
    their own intervals overlap.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError("a paired difference needs the same prompts on both sides")
    return bootstrap(first - second, seed)


def length_bias(
    verdicts: Sequence[float], len_a: Sequence[int], len_b: Sequence[int]
) -> float | None:
    """Share of decided verdicts (1: a wins, 0: b wins) that the longer answer won.

    0.5 is no preference for length. Ties (0.5) and pairs of equal length say nothing and are left
    out; None when nothing is left.
    """
    won = [
        (verdict > 0.5) == (a > b)
        for verdict, a, b in zip(verdicts, len_a, len_b, strict=True)
        if verdict != 0.5 and a != b
    ]
    return sum(won) / len(won) if won else None
