"""Rates models from pairwise comparisons of their answers (Bradley and Terry 1952).

The probability that model a wins against b is σ(a − b). The ratings are fitted as a logistic
regression on differences of one-hot vectors, with the first model's share of the win as the
outcome, so a tie is half a win for each. All comparisons on one prompt are one cluster of the
sandwich covariance, because they share the prompt's difficulty and its answers.
"""

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zephyr_ray.judge.statistics import LEVEL

POINTS = 400 / math.log(10)
"""Points of the Elo scale per unit of log-odds: 400 more points are odds of 10 to 1."""
ANCHOR = 1000.0
"""Rating of the anchor."""
UNREAD = "has no readable verdict"
WON = "won every comparison that links it to the rated models"
LOST = "lost every comparison that links it to the rated models"
UNLINKED = "is linked to the rated models by no chain of comparisons"
"""Reasons for which a model has no rating."""

Estimate = tuple[float, float | None, float | None]
"""A value and the ends of its interval; None if the interval is unknown."""


@dataclass(frozen=True)
class Comparison:
    """One verdict about the answers of two models to one prompt."""

    first: str
    second: str
    share: float
    """The first model's share of the win, from 0 to 1; a tie is 0.5."""
    prompt: str
    """The cluster; all comparisons on one prompt have the same text here."""
    style: tuple[float, ...] = ()
    """Differences in style to control for, first minus second."""


@dataclass(frozen=True)
class Ratings:
    """The ratings of the models that the comparisons determine, in points of the Elo scale."""

    rated: tuple[str, ...]
    """The models with ratings, the anchor first."""
    unrated: dict[str, str]
    """Why the other models have no rating."""
    coefficients: np.ndarray
    """Differences from the anchor in the order of `rated`, then the effects of style."""
    covariance: np.ndarray
    critical: float | None
    """Half the width of an interval in standard errors; None if there are too few prompts."""

    @property
    def anchor(self) -> str:
        """The model with the rating 1000; the others are rated relative to it."""
        return self.rated[0]

    def rating(self, model: str) -> Estimate:
        """Returns a model's rating; the anchor's has no interval."""
        if model == self.anchor:
            return ANCHOR, None, None
        value, low, high = self.difference(model, self.anchor)
        if low is None or high is None:
            return ANCHOR + value, None, None
        return ANCHOR + value, ANCHOR + low, ANCHOR + high

    def difference(self, a: str, b: str) -> Estimate:
        """Returns the rating of `a` minus that of `b`."""
        contrast = np.zeros(len(self.coefficients))
        contrast[self.rated.index(a)] += 1
        contrast[self.rated.index(b)] -= 1
        return self._estimate(contrast)

    def style_effects(self) -> list[Estimate]:
        """Returns the points that the root mean square of each difference in style is worth."""
        return [self._estimate(row) for row in np.eye(len(self.coefficients))[len(self.rated) :]]

    def rank(self, model: str) -> tuple[int, int, int]:
        """Returns a model's rank among the rated ones, and the best and the worst rank that the
        intervals of its differences from the others allow."""
        differences = [self.difference(model, other) for other in self.rated if other != model]
        above = sum(high is not None and high < 0 for _, _, high in differences)
        below = sum(low is not None and low > 0 for _, low, _ in differences)
        rank = 1 + sum(value < 0 for value, _, _ in differences)
        return rank, 1 + above, len(self.rated) - below

    def _estimate(self, contrast: np.ndarray) -> Estimate:
        value = float(contrast @ self.coefficients)
        variance = float(contrast @ self.covariance @ contrast)
        # Without any variation between prompts, the interval would have no width.
        if self.critical is None or variance < 1e-9:
            return value, None, None
        half = self.critical * math.sqrt(variance)
        return value, value - half, value + half


def rate(comparisons: Sequence[Comparison], models: Sequence[str]) -> Ratings:
    """Rates the largest group of models whose comparisons determine their differences.

    The anchor is the first of `models` if it is in that group, else the group's first. Raises
    ValueError if the differences in style explain every verdict, or are linearly dependent.
    """
    group = _comparable(comparisons, models)
    inside = [c for c in comparisons if c.first in group and c.second in group]
    prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys(c.prompt for c in inside))}
    styles = len(inside[0].style) if inside else 0
    coefficients = np.zeros(len(group) + styles)
    covariance = np.zeros((len(coefficients), len(coefficients)))
    if len(group) > 1:
        design = _design(inside, group)
        shares = np.array([c.share for c in inside])
        varies = _check_style(design, shares, styles)
        clusters = np.array([prompts[c.prompt] for c in inside])
        beta, beta_covariance = _fit(design[:, varies], shares, clusters)
        # The anchor's column is not in the design, because its coefficient is zero.
        places = np.flatnonzero(varies) + 1
        coefficients[places] = POINTS * beta
        covariance[np.ix_(places, places)] = POINTS**2 * beta_covariance
    return Ratings(
        rated=tuple(group),
        unrated={m: _reason(m, group, comparisons) for m in models if m not in group},
        coefficients=coefficients,
        covariance=covariance,
        critical=_critical(len(prompts), len(coefficients) - 1),
    )


def _comparable(comparisons: Sequence[Comparison], models: Sequence[str]) -> list[str]:
    """Returns the largest group of models in which each has won some share against the others,
    directly or through a chain; only within it are differences finite (Ford 1957)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    wins = _wins(comparisons)
    index = {model: n for n, model in enumerate(models)}
    edges = [(index[a], index[b]) for a, b in wins]
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    size = (len(models), len(models))
    graph = coo_array((np.ones(len(edges)), (rows, columns)), shape=size)
    _, labels = connected_components(graph, connection="strong")
    groups: dict[int, list[str]] = {}
    for model, label in zip(models, labels, strict=True):
        groups.setdefault(label, []).append(model)
    return max(groups.values(), key=len)  # of equal sizes the first


def _wins(comparisons: Sequence[Comparison]) -> set[tuple[str, str]]:
    """Returns the pairs of models whose first has won some share against the second."""
    won = {(c.first, c.second) for c in comparisons if c.share > 0}
    return won | {(c.second, c.first) for c in comparisons if c.share < 1}


def _reason(model: str, group: Collection[str], comparisons: Sequence[Comparison]) -> str:
    """Says why a model outside the group has no rating."""
    wins = _wins(comparisons)
    if not any(model in pair for pair in wins):
        return UNREAD
    if not _reachable([model], wins).isdisjoint(group):
        return WON
    if model in _reachable(group, wins):
        return LOST
    return UNLINKED


def _reachable(start: Collection[str], wins: set[tuple[str, str]]) -> set[str]:
    """Returns `start` and all models that a chain of wins from them reaches."""
    reached, pending = set(start), list(start)
    while pending:
        winner = pending.pop()
        losers = {b for a, b in wins if a == winner} - reached
        reached |= losers
        pending += losers
    return reached


def _design(comparisons: Sequence[Comparison], group: Sequence[str]) -> np.ndarray:
    """Returns a row per comparison: 1 for the first model, −1 for the second, without the anchor's
    column; then the differences in style, each divided by its root mean square.

    They are not centered: ratings are those at equal style, and centering would make them depend
    on which model of a comparison is the first.
    """
    index = {model: n for n, model in enumerate(group)}
    design = np.zeros((len(comparisons), len(group)))
    for row, comparison in zip(design, comparisons, strict=True):
        row[index[comparison.first]] += 1
        row[index[comparison.second]] -= 1
    style = np.array([c.style for c in comparisons]).reshape(len(comparisons), -1)
    scale = np.sqrt(np.mean(style**2, axis=0))
    return np.hstack([design[:, 1:], style / np.where(scale > 0, scale, 1)])


def _check_style(design: np.ndarray, shares: np.ndarray, styles: int) -> np.ndarray:
    """Returns which columns vary; a style that no answer uses has no effect to estimate. Raises
    ValueError if the coefficients are not unique or not finite."""
    varies = np.any(design != 0, axis=0)
    if styles and np.linalg.matrix_rank(design[:, varies]) < varies.sum():
        raise ValueError("the differences in style depend on each other or on the models")
    if styles and _is_separated(design[:, varies], shares):
        raise ValueError("the differences in style explain every verdict")
    return varies


def _is_separated(design: np.ndarray, shares: np.ndarray) -> bool:
    """Returns whether some coefficients predict every verdict, so that the fit has no finite
    solution (Albert and Anderson 1984)."""
    from scipy.optimize import linprog

    signed = design * np.where(shares == 1, 1, np.where(shares == 0, -1, 0))[:, None]
    ties = design[(shares > 0) & (shares < 1)]
    program = linprog(
        -signed.sum(axis=0),
        A_ub=-signed,
        b_ub=np.zeros(len(signed)),
        A_eq=ties if len(ties) else None,
        b_eq=np.zeros(len(ties)) if len(ties) else None,
        bounds=(-1, 1),
    )
    return bool(-program.fun > 1e-6)


def _fit(
    design: np.ndarray, shares: np.ndarray, clusters: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coefficients of a logistic regression and their cluster-robust covariance."""
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM
    from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

    # Shares as outcomes give the same estimates and cluster sums of scores as two weighted rows per
    # comparison; the cluster-robust covariance does not support weights.
    model = GLM(shares, design, family=Binomial())
    options: dict[str, Any] = {"maxiter": 200, "tol": 1e-12}
    if len(set(clusters)) > 1:
        options |= {"cov_type": "cluster", "cov_kwds": {"groups": clusters}}
    with warnings.catch_warnings():
        # It also warns if all verdicts are ties, although the ratings are then well defined.
        warnings.simplefilter("ignore", PerfectSeparationWarning)
        result = model.fit(**options)
    return np.asarray(result.params), np.asarray(result.cov_params())


def _critical(prompts: int, parameters: int) -> float | None:
    """Returns the quantile of Student's t for intervals; None if the covariance of that many
    parameters cannot be estimated from so few prompts."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, prompts - 1)) if prompts > max(1, parameters) else None
