"""Computes the agreement of repeated ratings, and rank correlations."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Computes Krippendorff's alpha for ordinal ratings: 1 is full agreement, 0 is chance.

    A unit holds all ratings of one answer; units with fewer than two do not count. Returns None if
    the ratings do not differ, which leaves chance undefined. Source: Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability", section D.
    """
    paired = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in paired for value in unit})
    if len(values) < 2:
        return None
    coincidences = np.zeros((len(values), len(values)))
    for unit in paired:
        given = np.array([unit.count(value) for value in values], dtype=float)
        pairs = np.outer(given, given) - np.diag(given)
        coincidences += pairs / (len(unit) - 1)
    totals = coincidences.sum(axis=1)
    # The ordinal distance of two values is the number of ratings between them, where those at the
    # two values count half.
    middle = np.cumsum(totals) - totals / 2
    distances = (middle[:, None] - middle[None, :]) ** 2
    observed = (coincidences * distances).sum()
    expected = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1)
    return float(1 - observed / expected)


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Computes Spearman's rank correlation, from −1 to 1. Returns None if it is undefined, because
    there are fewer than three values or all are equal."""
    first, second = (_ranks(np.asarray(side, dtype=float)) for side in (a, b))
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value; equal values share the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]
