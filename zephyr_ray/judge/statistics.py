"""Computes means of judgements and their uncertainty.

Judgements of one prompt (both orders, turns, samples, judges) are not independent: they form a
cluster, and intervals and standard errors count prompts, not judgements.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
"""Coverage of all intervals."""
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Half the width of a normal interval of that coverage, in standard errors."""
CHUNK = 2_000_000
"""Maximum random draws in memory at once."""
SAME = 1e-12
"""Differences between means below this are rounding errors."""


def bootstrap(
    values: ArrayLike,
    seed: int,
    clusters: Sequence[Any] | None = None,
    n: int = 10_000,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """Computes the mean of the values and its interval: (mean, low, high).

    `clusters` names the prompt of each value; without it, each value has its own. Draws prompts
    with replacement `n` times and corrects the quantiles of the means for bias and skew (BCa; Efron
    and Tibshirani 1993, chapter 14). One prompt, or prompts with equal means, give an interval of
    zero width, which means unknown rather than certain. Raises ValueError if there is no value.
    """
    from scipy.stats import bootstrap as resample

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("bootstrap needs one value per prompt, and at least one prompt")
    sums, counts = _by_cluster(array, clusters)
    mean = float(array.mean())
    if np.ptp(sums / counts) < SAME:
        return mean, mean, mean
    interval = resample(
        (sums, counts),
        lambda totals, sizes, axis: totals.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=n,
        batch=max(1, CHUNK // sums.size),
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int) -> tuple[float, float, float]:
    """Computes the mean of a - b over the same prompts and its interval: (mean, low, high).

    Pairing cancels the difficulty of each prompt, so it separates two models better than their own
    intervals do. Raises ValueError if the two sides differ in length.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError("a paired difference needs the same prompts on both sides")
    return bootstrap(first - second, seed)


def clustered_error(values: ArrayLike, clusters: Sequence[Any]) -> float:
    """Computes the standard error of the mean μ, √Σ_c(Σ_{i∈c}(x_i − μ))² / n, with the clusters c
    of the n values x; 0 if there is one cluster, which means unknown."""
    array = np.asarray(values, dtype=np.float64)
    sums, _ = _by_cluster(array - array.mean(), clusters)
    return float(np.sqrt((sums**2).sum()) / array.size)


def length_bias(
    verdicts: Sequence[float], len_a: Sequence[int], len_b: Sequence[int]
) -> float | None:
    """Computes the share of decided verdicts (over 0.5: a wins) that the longer answer won.

    0.5 is no preference for length. Ties (0.5) and pairs of equal length are left out. Returns None
    if nothing is left.
    """
    won = [
        (verdict > 0.5) == (a > b)
        for verdict, a, b in zip(verdicts, len_a, len_b, strict=True)
        if verdict != 0.5 and a != b
    ]
    return sum(won) / len(won) if won else None


def _by_cluster(
    array: NDArray[np.float64], clusters: Sequence[Any] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the sum and the number of values of each cluster. Raises ValueError if a value has no
    cluster."""
    if clusters is None:
        return array, np.ones_like(array)
    if len(clusters) != array.size:
        raise ValueError("each value needs the name of its prompt")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=array).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)
