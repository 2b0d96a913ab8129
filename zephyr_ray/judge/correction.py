"""Corrects a judge's win rate with people's labels: PPI++ and the two-parameter correction.

Verdicts of the judge and labels of people are shares of a win: 1 a win, 0 a loss, ½ a tie. All
rates are clipped to [0, 1].
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from zephyr_ray.judge.statistics import Z

ENOUGH_LABELS = 50
"""Number of labels below which a correction is called unreliable."""


@dataclass(frozen=True)
class Rate:
    """A rate and its interval."""

    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class PredictionPowered(Rate):
    """A rate corrected by PPI++."""

    weight: float
    """λ*, the weight of the judge: 0 uses the labels alone."""


@dataclass(frozen=True)
class TwoParameter:
    """A correction based on how often the judge agrees with people."""

    q0: float | None
    """Judge's share for the baseline where people prefer the baseline; None without such labels."""
    q1: float | None
    """Judge's share for the model where people prefer the model; None without such labels."""
    corrected: Rate | None
    """None if q0 or q1 is None, there are no verdicts, or q0 + q1 is not above 1 beyond chance:
    the verdicts then say too little about what people prefer."""


def share(values: ArrayLike) -> Rate | None:
    """Returns the mean of verdicts with the interval of Agresti and Coull (1998), which keeps
    its coverage for few verdicts and for shares near 0 and 1. Returns None without verdicts."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None
    middle, variance = _with_pseudo_verdicts(array, Z**2)
    return _rate(float(array.mean()), middle, Z * variance**0.5)


def prediction_powered(
    verdicts: ArrayLike, labelled_verdicts: ArrayLike, labels: ArrayLike
) -> PredictionPowered | None:
    """Computes PPI++ (Angelopoulos, Duchi and Zrnic 2023, arXiv 2311.01453) for a mean:
    θ = mean(λf) over all N verdicts f + mean(Y − λf) over the n labels Y, with the λ in [0, 1] that
    minimizes its variance, λ²·Var(f)/N + Var(Y − λf)/n. Returns None if n or N is below 2, because
    there is no variance then.
    """
    f, g, y = (np.asarray(v, dtype=np.float64) for v in (verdicts, labelled_verdicts, labels))
    if f.size < 2 or y.size < 2:
        return None
    covariance = float(np.mean((y - y.mean()) * (g - g.mean())))
    variance = float(np.concatenate([g, f]).var(ddof=1))
    best = covariance / ((1 + y.size / f.size) * variance) if variance else 0.0
    weight = min(1.0, max(0.0, best))
    residuals = y - weight * g
    rate = float(weight * f.mean() + residuals.mean())
    margin = Z * float(weight**2 * f.var() / f.size + residuals.var() / y.size) ** 0.5
    corrected = _rate(rate, rate, margin)
    return PredictionPowered(corrected.rate, corrected.low, corrected.high, weight)


def two_parameter(verdicts: ArrayLike, where_won: ArrayLike, where_lost: ArrayLike) -> TwoParameter:
    """Corrects the mean verdict p with q1 and q0, the judge's agreement with people where they
    prefer the model and where they prefer the baseline: θ = (p + q0 − 1) / (q0 + q1 − 1).

    `where_won` and `where_lost` are the judge's verdicts for the model in these two cases. The
    interval is that of Lee et al. (2025, arXiv 2511.21140), after Lang and Reiczigel (2014): the
    formula on shares that include pseudo-verdicts, shifted by its second-order bias.
    """
    f, won = np.asarray(verdicts, dtype=np.float64), np.asarray(where_won, dtype=np.float64)
    agreed = 1 - np.asarray(where_lost, dtype=np.float64)
    q0, q1 = (float(a.mean()) if a.size else None for a in (agreed, won))
    if q0 is None or q1 is None or not f.size:
        return TwoParameter(q0, q1, None)
    (p_, p_variance), (q0_, q0_variance), (q1_, q1_variance) = (
        _with_pseudo_verdicts(f, Z**2),
        _with_pseudo_verdicts(agreed, 2),
        _with_pseudo_verdicts(won, 2),
    )
    slope = q0_ + q1_ - 1
    if slope <= Z * (q0_variance + q1_variance) ** 0.5:
        return TwoParameter(q0, q1, None)
    theta = (p_ + q0_ - 1) / slope
    shift = 2 * Z**2 * (theta * q1_variance - (1 - theta) * q0_variance)
    variance = p_variance + (1 - theta) ** 2 * q0_variance + theta**2 * q1_variance
    rate = (float(f.mean()) + q0 - 1) / (q0 + q1 - 1)
    return TwoParameter(q0, q1, _rate(rate, theta + shift, Z * variance**0.5 / slope))


def _with_pseudo_verdicts(values: np.ndarray, count: float) -> tuple[float, float]:
    """Returns the mean and the variance of the mean after adding `count` verdicts, half of them 1
    and half 0."""
    total = values.size + count
    mean = (float(values.sum()) + count / 2) / total
    square = (float((values**2).sum()) + count / 2) / total
    return mean, (square - mean**2) / total


def _rate(rate: float, middle: float, margin: float) -> Rate:
    clipped = [min(1.0, max(0.0, value)) for value in (rate, middle - margin, middle + margin)]
    return Rate(*clipped)
