"""Estimates the win rate between answers of equal length, by AlpacaEval's formula.

P(win) = σ(β₀ + β₁·tanh(d / sd(d))), where d is the length of the model's answer minus the length of
the baseline's, in characters. The length-controlled rate is P at d = 0, σ(β₀): AlpacaEval 2's
`length_controlled_minimal`, without its penalty on β. A tie counts as half a win. Unlike
AlpacaEval's, the standard errors include the uncertainty of β, and are clustered by prompt.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zephyr_ray.judge.statistics import LEVEL

MIN_PROMPTS = 30
"""Minimum number of prompts; with fewer, clustered standard errors are too small."""
FAR_ABSOLUTE, FAR_RELATIVE = 0.1, 0.25
"""AlpacaEval's warning thresholds: length control moves a win rate far if the change exceeds both
FAR_ABSOLUTE and FAR_RELATIVE × the distance from the raw rate to the bound (0 or 1) in that
direction."""

ALWAYS_LONGER = "the model's answer is always the longer one"
ALWAYS_SHORTER = "the model's answer is always the shorter one"
LENGTH_PREDICTS_ALL = "the difference in length alone predicts every verdict"


def obstacle(verdicts: ArrayLike, differences: ArrayLike, prompts: Sequence[Any]) -> str:
    """Returns why no length-controlled rate can be estimated; empty if one can be.

    `differences` are lengths of the model's answers minus lengths of the baseline's. The estimates
    of β exist only if no length separates wins from losses (Albert and Anderson 1984).
    """
    y, d = np.asarray(verdicts, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if len(set(prompts)) < MIN_PROMPTS:
        return f"fewer than {MIN_PROMPTS} prompts have a verdict"
    if np.ptp(d) == 0:
        return "the difference in length is the same for all prompts"
    if d.min() > 0 or d.max() < 0:
        return ALWAYS_LONGER if d.min() > 0 else ALWAYS_SHORTER
    wins, losses = d[y > 0], d[y < 1]  # a tie is half of each
    if not (wins.size and losses.size):
        return f"every verdict is a {'win' if wins.size else 'loss'}"
    if wins.min() >= losses.max() or losses.min() >= wins.max():
        return LENGTH_PREDICTS_ALL
    return ""


def length_may_explain_verdicts(obstacle: str) -> bool:
    """Returns whether length alone may explain the verdicts, given the `obstacle` that
    prevented a length-controlled rate."""
    return obstacle in (ALWAYS_LONGER, ALWAYS_SHORTER, LENGTH_PREDICTS_ALL)


def length_controlled(
    verdicts: ArrayLike, differences: ArrayLike, prompts: Sequence[Any]
) -> tuple[float, float, float]:
    """Estimates the length-controlled win rate and its interval: (rate, low, high).

    The interval is that of β₀, mapped through σ, so it stays between 0 and 1. Call it only if
    `obstacle` returns an empty text.
    """
    from scipy.special import expit
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM
    from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

    d = np.asarray(differences, dtype=np.float64)
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    model = GLM(np.asarray(verdicts, dtype=np.float64), design(d), family=Binomial())
    with warnings.catch_warnings():
        # statsmodels also warns if all verdicts are ties, although the rate is then well defined.
        warnings.simplefilter("ignore", PerfectSeparationWarning)
        fit = model.fit(cov_type="cluster", cov_kwds={"groups": groups})
    rate, low, high = expit([fit.params[0], *fit.conf_int(alpha=1 - LEVEL)[0]])
    return float(rate), float(low), float(high)


def design(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the columns of the regression: 1 and the scaled difference in length."""
    scaled = np.tanh(differences / differences.std(ddof=1))
    return np.column_stack([np.ones_like(scaled), scaled])


def moves_far(raw: float, controlled: float) -> bool:
    """Returns whether length control moves a rate so far that AlpacaEval warns: the estimate may be
    unreliable, or length decided the raw rate."""
    lowest = min(raw - FAR_RELATIVE * raw, raw - FAR_ABSOLUTE)
    highest = max(raw + FAR_RELATIVE * (1 - raw), raw + FAR_ABSOLUTE)
    return not lowest <= controlled <= highest
