"""Computes the metrics of a comparison from its judged rows.

A row is a judgement with the lengths of both answers and flags of the model's answer
(gathering.describe). Each metric takes the rows of one model and the seed of its bootstrap, and
returns its values as a tuple.
"""

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from statistics import fmean
from typing import Any

from zephyr_ray.judge.length_control import length_controlled, obstacle
from zephyr_ray.judge.statistics import (
    bootstrap,
    clustered_error,
    length_bias,
    paired_difference,
)

Row = dict[str, Any]
BOTH_EMPTY = "both answers are empty"
"""Reason of a comparison without a verdict, because there is nothing to compare."""


def parsed(rows: list[Row]) -> list[Row]:
    """Returns the rows with a verdict, which a win rate is computed from."""
    return [row for row in rows if row["verdict"] is not None]


def passed(row: Row) -> bool | None:
    """Returns whether the model's answer ended by itself, satisfies its constraint and does not
    loop.

    Returns None if the rules judge did not score it. On-topic is a separate figure.
    """
    # The model's own answer; the baseline's is scores[1].
    checks = row["scores"][0]["checks"] if row["scores"] else {}
    if not checks:
        return None
    return all(value for name, value in checks.items() if name != "on_topic")


def flipped(row: Row) -> bool:
    """Returns whether swapping the order of the two answers changed the winner."""
    orders = row.get("orders") or []
    if len(orders) < 2 or None in orders:
        return bool(row.get("flip"))
    return (orders[0] - 0.5) * (orders[1] - 0.5) < 0


def win_differences(by_model: dict[str, list[Row]], seed: int) -> list[dict[str, Any]]:
    """Computes the difference in win rate of each pair of models, over the prompts with verdicts
    on both: the model with the higher rate minus the other; at equal rates, the later minus the
    earlier. The best model's differences come first."""
    verdicts = {
        model: {row["prompt_id"]: row["verdict"] for row in parsed(rows)}
        for model, rows in by_model.items()
    }
    rates = {model: fmean(own.values()) for model, own in reversed(verdicts.items()) if own}
    differences = []
    for a, b in combinations(sorted(rates, key=lambda model: -rates[model]), 2):
        if both := [prompt for prompt in verdicts[a] if prompt in verdicts[b]]:
            sides = [verdicts[a][p] for p in both], [verdicts[b][p] for p in both]
            mean, low, high = paired_difference(*sides, seed)
            differences.append({"a": a, "b": b, "win_difference": mean, "low": low, "high": high})
    return differences


def pass_difference(a: list[Row], b: list[Row], seed: int) -> dict[str, float] | None:
    """Computes the pass rate of `a` minus that of `b`, over the prompts that both answered."""
    passed_b = {row["prompt_id"]: passed(row) for row in b}
    pairs = [
        (p, q)
        for row in a
        if (p := passed(row)) is not None and (q := passed_b.get(row["prompt_id"])) is not None
    ]
    if not pairs:
        return None
    mean, low, high = paired_difference([p for p, _ in pairs], [q for _, q in pairs], seed)
    return {"pass_difference": mean, "low": low, "high": high}


def win_rate(rows: list[Row], seed: int) -> tuple[float | None, ...]:
    verdicts = [row["verdict"] for row in parsed(rows)]
    return bootstrap(verdicts, seed) if verdicts else (None, None, None)


def standard_error(rows: list[Row], seed: int) -> tuple[float | None]:
    decided = parsed(rows)
    prompts = [row["prompt_id"] for row in decided]
    return (clustered_error([r["verdict"] for r in decided], prompts) if decided else None,)


def length_control(rows: list[Row], seed: int) -> tuple[Any, ...]:
    """Returns the length-controlled rate, its interval and an empty text; if it cannot be
    estimated, None for each and the reason."""
    decided = parsed(rows)
    verdicts = [row["verdict"] for row in decided]
    differences = [row["characters"][0] - row["characters"][1] for row in decided]
    prompts = [row["prompt_id"] for row in decided]
    if reason := obstacle(verdicts, differences, prompts):
        return None, None, None, reason
    return *length_controlled(verdicts, differences, prompts), ""


def length_control_move(rows: list[Row], seed: int) -> tuple[float | None]:
    """Returns the length-controlled rate minus the win rate."""
    rate, _, _, reason = length_control(rows, seed)
    decided = parsed(rows)
    return (None if reason else rate - sum(row["verdict"] for row in decided) / len(decided),)


def tally(rows: list[Row], seed: int) -> tuple[int, int, int]:
    """Returns the numbers of wins, ties and losses; a verdict above 0.5 is a win, one of 0.5 a
    tie."""
    signs = Counter((row["verdict"] > 0.5) - (row["verdict"] < 0.5) for row in parsed(rows))
    return signs[1], signs[0], signs[-1]


def flips(rows: list[Row], seed: int) -> tuple[int]:
    return (sum(map(flipped, rows)),)


def unparsable(rows: list[Row], seed: int) -> tuple[int]:
    return (sum(row["verdict"] is None and row.get("reason") != BOTH_EMPTY for row in rows),)


def first_position(rows: list[Row], seed: int) -> tuple[Any, ...]:
    """Returns the mean share of the win that went to the answer shown first, its interval over
    prompts, and the number of questions that it is computed from."""
    shares: list[float] = []
    prompts: list[str] = []
    for row in rows:
        # The model's answer is shown first in the first question, second in the other.
        for place, share in enumerate(row.get("orders") or []):
            if share is not None:
                shares.append(1 - share if place else share)
                prompts.append(row["prompt_id"])
    return (*(bootstrap(shares, seed, prompts) if shares else (None,) * 3), len(shares))


def longer_wins(rows: list[Row], seed: int) -> tuple[float | None]:
    decided = parsed(rows)
    lengths = [row["characters"][0] for row in decided], [row["characters"][1] for row in decided]
    return (length_bias([row["verdict"] for row in decided], *lengths),)


def pass_rate(rows: list[Row], seed: int) -> tuple[float | None, ...]:
    passes = [p for row in rows if (p := passed(row)) is not None]
    return bootstrap(passes, seed) if passes else (None, None, None)


def on_topic(rows: list[Row], seed: int) -> tuple[float | None]:
    checks = [row["scores"][0]["checks"] for row in rows if row["scores"]]
    topics = [c["on_topic"] for c in checks if "on_topic" in c]
    return (sum(topics) / len(topics) if topics else None,)


def share(name: str) -> Callable[[list[Row], int], tuple[float]]:
    """Returns a function that computes the share of rows for which a flag is true."""
    return lambda rows, seed: (sum(row[name] for row in rows) / len(rows),)


def by_constraint(rows: list[Row], seed: int) -> tuple[dict[str, Any]]:
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        if row["constraint"] and (has_passed := passed(row)) is not None:
            kinds.setdefault(row["constraint"]["kind"], []).append(has_passed)
    rates = {k: {"pass_rate": sum(v) / len(v), "prompts": len(v)} for k, v in sorted(kinds.items())}
    return (rates,)
