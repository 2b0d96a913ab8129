"""Computes the figures that likelihood stages report: metrics with their uncertainty, and
their differences between models (the alignment tax, if negative)."""

from collections.abc import Callable
from math import fsum, sqrt
from statistics import mean, variance
from typing import Any

from zephyr_ray.judge.statistics import Z, bootstrap, paired_difference

Row = dict[str, Any]
"""One question, with the metrics of each model in `models`."""


def summarize(
    rows: list[Row],
    models: list[str],
    metrics: list[str],
    standard_error: Callable[[list[float]], float | None],
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the value of each metric of a task and model, with its standard error and
    interval."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in metrics:
        results[metric] = {}
        for model in models:
            values = _values(rows, metric, model)
            value, low, high = bootstrap(values, seed)
            error = standard_error(values)
            results[metric][model] = {"value": value, "stderr": error, "low": low, "high": high}
    return results


def tax(
    answers: dict[str, list[Row]], models: list[str], tasks: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Returns, for each later model, its metric minus that of the first: per task, over the same
    questions, and the mean over tasks. A negative difference is the alignment tax."""
    before, *later = models
    differences = []
    for after in later:
        per_task = []
        for task, rows in answers.items():
            metric = tasks[task]["metric"]
            sides = _values(rows, metric, after), _values(rows, metric, before)
            difference, low, high = paired_difference(*sides, seed)
            moved = [a - b for a, b in zip(*sides, strict=True)]
            per_task.append((difference, _squared_error(moved)))
            names = {"after": after, "before": before, "task": task, "metric": metric}
            facts = {"questions": len(rows), "changed": sum(d != 0 for d in moved)}
            differences.append(names | facts | {"difference": difference, "low": low, "high": high})
        differences.append({"after": after, "before": before, "task": None} | _average(per_task))
    return differences


def _average(per_task: list[tuple[float, float]]) -> dict[str, float]:
    """Returns the mean of the tasks' differences, which are independent, and its normal interval.
    `per_task` has (difference, squared standard error) per task."""
    n = len(per_task)
    average = fsum(difference for difference, _ in per_task) / n
    half = Z * sqrt(fsum(error for _, error in per_task)) / n
    return {"difference": average, "low": average - half, "high": average + half}


def _squared_error(values: list[float]) -> float:
    """Returns the squared standard error of the mean of differences from -1 to 1; for a single one,
    the largest possible value."""
    return variance(values, mean(values)) / len(values) if len(values) > 1 else 1.0


def _values(rows: list[Row], metric: str, model: str) -> list[float]:
    return [row["models"][model][metric] for row in rows]
