"""Builds plots of the length of answers against their outcome and their score."""

from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean, median
from typing import Any

from zephyr_ray.section import Scatter

Point = tuple[float, float]
MOST, FEWEST = 10, 10
"""Maximum points per model; minimum answers per point."""


def scatters(rows: list[dict[str, Any]], baseline: str) -> Iterator[Scatter]:
    """Yields a plot of the win rate against the difference in length, and, if the judge scores
    answers, one of the score against the length. `rows` are those of the artifact."""
    outcomes: dict[str, list[Point]] = defaultdict(list)
    scores: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        lengths = {model: len(answer["text"]) for model, answer in row["answers"].items()}
        for model, answer in row["answers"].items():
            verdict = row.get("verdicts", {}).get(model, {}).get("verdict")
            if model != baseline and baseline in lengths and verdict is not None:
                outcomes[model].append((lengths[model] - lengths[baseline], verdict))
            if answer.get("score") is not None:
                scores[model].append((lengths[model], answer["score"]))
    each = f"each point is {FEWEST} or more answers of similar length"
    if series := _binned(outcomes):
        title = f"Length against outcome; {each}"
        yield Scatter(title, f"Characters more than {baseline}", "Win rate", series)
    if series := _binned(scores):
        yield Scatter(f"Length against score; {each}", "Characters", "Mean score", series)


def _binned(points: dict[str, list[Point]]) -> tuple[tuple[str, tuple[Point, ...]], ...]:
    """Sorts each model's points by x, splits them into parts of equal size, and returns the median
    x and the mean y of each part. Omits models with fewer than two parts."""
    series = []
    for model, pairs in points.items():
        ordered, count = sorted(pairs), min(MOST, len(pairs) // FEWEST)
        parts = [
            ordered[len(ordered) * i // count : len(ordered) * (i + 1) // count]
            for i in range(count)
        ]
        if count > 1:
            bins = ((median(x for x, _ in part), fmean(y for _, y in part)) for part in parts)
            series.append((model, tuple(bins)))
    return tuple(series)
