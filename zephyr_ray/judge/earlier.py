"""Completes results of earlier versions: computes the figures that they lack from their rows."""

from math import comb
from typing import Any

from zephyr_ray.judge.figures import FIGURES, summary
from zephyr_ray.judge.gathering import describe
from zephyr_ray.judge.measures import Row, win_differences

Result = dict[str, Any]
"""The content of result.json."""


def complete(result: Result, rows: list[Row], seed: int) -> Result:
    """Returns a result with all figures and differences; figures that it has stay as they are.

    Old rows have verdicts and answers, but no checks and no orders, so figures about those
    stay unknown.
    """
    names = {name for figure in FIGURES for name in figure.names}
    complete_models = all(names <= figures.keys() for figures in result["models"].values())
    rated = [m for m, f in result["models"].items() if f.get("win_rate") is not None]
    pairs = comb(len(rated) - (result["baseline"] in rated), 2)
    differences = result.get("win_differences")
    if complete_models and differences is not None and len(differences) >= pairs:
        return result
    by_model = _judged(rows, result["baseline"])
    models = {
        model: (summary(by_model[model], seed) if model in by_model else {}) | figures
        for model, figures in result["models"].items()
    }
    compared = {model: judged for model, judged in by_model.items() if model != result["baseline"]}
    return {**result, "win_differences": win_differences(compared, seed), "models": models}


def _judged(rows: list[Row], baseline: str) -> dict[str, list[Row]]:
    """Returns the judged rows of each model, from the rows of an artifact."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        answers = row["answers"]
        for model, verdict in row.get("verdicts", {}).items():
            if model in answers and baseline in answers:
                facts = describe(answers[model], answers[baseline])
                kept = {"prompt_id": row["id"], "constraint": row.get("constraint")}
                by_model.setdefault(model, []).append({"scores": None, **kept, **verdict, **facts})
    return by_model
