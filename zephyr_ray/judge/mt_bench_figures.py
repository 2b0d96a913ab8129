"""Computes means of two-turn judgements, with intervals clustered by question."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from zephyr_ray.judge.mt_bench_questions import TEMPERATURES, TURNS, Row
from zephyr_ray.judge.statistics import bootstrap

Estimate = dict[str, Any]
"""A mean as {"mean", "low", "high", "judgements", "questions"}."""


def value(row: Row) -> float | None:
    """Returns the score or verdict of a judgement; None if its reply is unparsable."""
    return row["score"] if "score" in row else row["verdict"]


def summary(rows: list[Row], questions: dict[str, Row], seed: int) -> dict[str, Any]:
    """Computes the figures of one model from its judgements, for result.json."""
    read = [row for row in rows if value(row) is not None]
    by_turn = {turn: [r for r in read if r["turn"] == turn] for turn in range(1, TURNS + 1)}
    by_category = {
        category: [row for row in read if row["category"] == category]
        for category in ordered({question["category"] for question in questions.values()})
    }
    asked = TURNS * len(questions)
    figures = {
        "overall": estimate(read, seed),
        "turns": {str(turn): estimate(own, seed) for turn, own in by_turn.items()},
        "categories": {name: estimate(own, seed) for name, own in by_category.items()},
        "asked": asked,
        "read": len(read),
        "unparsable": len(rows) - len(read),
        "missing": asked - len(rows),
    }
    if any("verdict" in row for row in rows):
        tally = Counter((v > 0.5) - (v < 0.5) for row in read if (v := value(row)) is not None)
        figures |= {"wins": tally[1], "ties": tally[0], "losses": tally[-1]}
        figures["flips"] = sum(bool(row.get("flip")) for row in rows)
    return figures


def estimate(rows: list[Row], seed: int) -> Estimate | None:
    """Computes the mean of judgements and its interval; None if there are none. Both turns of a
    question are one cluster, because the second depends on the first."""
    return _estimate([(row["question"], value(row)) for row in rows], seed)


def difference(a: list[Row], b: list[Row], seed: int) -> Estimate | None:
    """Computes the mean of `a` minus `b` over the turns with judgements of both."""
    scores = {(row["question"], row["turn"]): v for row in b if (v := value(row)) is not None}
    differences = [
        (row["question"], v - scores[row["question"], row["turn"]])
        for row in a
        if (v := value(row)) is not None and (row["question"], row["turn"]) in scores
    ]
    return _estimate(differences, seed)


def ordered(categories: Iterable[str]) -> list[str]:
    """Returns the categories in MT-Bench's order, then all others by name."""
    known = list(TEMPERATURES)
    return sorted(categories, key=lambda c: (known.index(c) if c in known else len(known), c))


def _estimate(values: list[tuple[str, Any]], seed: int) -> Estimate | None:
    if not values:
        return None
    questions, numbers = zip(*values, strict=True)
    mean, low, high = bootstrap(numbers, seed, clusters=questions)
    counts = {"judgements": len(numbers), "questions": len(set(questions))}
    return {"mean": mean, "low": low, "high": high, **counts}
