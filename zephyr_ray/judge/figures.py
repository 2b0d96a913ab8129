"""Defines the figures of a comparison: how each is computed from judged rows and how it is shown.

FIGURES lists them all; result.json, the manifest's counts, and the report's table and bars
follow from it. A new figure is one entry.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zephyr_ray.judge.statistics import bootstrap, length_bias, paired_difference
from zephyr_ray.section import Cell, Interval

Row = dict[str, Any]
"""One judged comparison of a model's answer with the baseline's."""
BOTH_EMPTY = "both answers are empty"
"""Reason of a comparison without a verdict, because there is nothing to compare."""


@dataclass(frozen=True)
class Figure:
    """One figure of a model, as numbers and as a column of the report."""

    names: tuple[str, ...]
    """Names of its values in result.json."""
    compute: Callable[[list[Row], int], tuple[Any, ...]]
    """Returns the values from a model's judged rows and the seed of the bootstrap."""
    heading: str = ""
    """Heading of its column in the report; a figure without one has no column."""
    help: str = ""
    """Explanation below the report's table; empty for none."""
    digits: int = 2
    """Decimals in the report."""
    compared: bool = False
    """Whether it compares with the baseline; the baseline then has no value."""
    plot: str = ""
    """Title of its bar chart; empty for none. With a chart, `compute` returns (rate, low, high),
    or None for each, and the rate is also a manifest count."""

    def cell(self, model: str, result: dict[str, Any]) -> Cell:
        """Returns the cell of one model; `result` may be from a version without this figure."""
        if self.compared and model == result["baseline"]:
            return "baseline" if self.plot else None
        values = tuple(result["models"][model].get(name) for name in self.names)
        if None in values:
            return None
        if self.plot:
            return Interval(*values)
        return values if len(values) > 1 else values[0]


def summary(rows: list[Row], seed: int) -> dict[str, Any]:
    """Computes every figure of one model from its judged rows."""
    return {
        name: value
        for figure in FIGURES
        for name, value in zip(figure.names, figure.compute(rows, seed), strict=True)
    }


def passed(row: Row) -> bool | None:
    """Returns whether the model's answer ended by itself, satisfies its constraint and does not
    loop.

    Returns None if the rules judge did not score it. On-topic is a separate figure.
    """
    if not row["scores"]:
        return None
    checks = row["scores"][0]["checks"]  # the model's own answer; the baseline's is scores[1]
    return all(value for name, value in checks.items() if name != "on_topic")


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


def left_out(figures: dict[str, Any]) -> int:
    """Returns how many prompts a model's win rate leaves out. Results of earlier versions count
    only unparsable replies."""
    return figures.get("left_out", figures.get("parse_failures", 0))


def parsed(rows: list[Row]) -> list[Row]:
    """Returns the rows with a verdict, which a win rate is computed from."""
    return [row for row in rows if row["verdict"] is not None]


def _win_rate(rows: list[Row], seed: int) -> tuple[float | None, ...]:
    verdicts = [row["verdict"] for row in parsed(rows)]
    return bootstrap(verdicts, seed) if verdicts else (None, None, None)


def _pass_rate(rows: list[Row], seed: int) -> tuple[float | None, ...]:
    passes = [p for row in rows if (p := passed(row)) is not None]
    return bootstrap(passes, seed) if passes else (None, None, None)


def _on_topic(rows: list[Row], seed: int) -> tuple[float | None]:
    checks = [row["scores"][0]["checks"] for row in rows if row["scores"]]
    topics = [c["on_topic"] for c in checks if "on_topic" in c]
    return (sum(topics) / len(topics) if topics else None,)


def _tally(rows: list[Row], seed: int) -> tuple[int, int, int]:
    tally = Counter(row["verdict"] for row in rows)
    return tally[1.0], tally[0.5], tally[0.0]


def _length_bias(rows: list[Row], seed: int) -> tuple[float | None]:
    decided = parsed(rows)
    words = [row["words"][0] for row in decided], [row["words"][1] for row in decided]
    return (length_bias([row["verdict"] for row in decided], *words),)


def _by_constraint(rows: list[Row], seed: int) -> tuple[dict[str, Any]]:
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        if row["constraint"] and (has_passed := passed(row)) is not None:
            kinds.setdefault(row["constraint"]["kind"], []).append(has_passed)
    rates = {k: {"pass_rate": sum(v) / len(v), "prompts": len(v)} for k, v in sorted(kinds.items())}
    return (rates,)


FIGURES = (
    Figure(
        names=("win_rate", "low", "high"),
        compute=_win_rate,
        heading="Win rate",
        compared=True,
        plot="Win rate against {baseline}",
    ),
    Figure(
        names=("pass_rate", "pass_low", "pass_high"),
        compute=_pass_rate,
        heading="Checks passed",
        help="share of answers that ended by themselves, satisfy their constraint and do not loop. "
        "The rules judge's score is 1 + 9 × the share of all checks, including on-topic, that an "
        "answer passes. Rules check form, not truth: a wrong answer in the right form passes.",
        plot="Checks passed",
    ),
    Figure(
        names=("on_topic",),
        compute=_on_topic,
        heading="On topic",
        help="share of answers similar in meaning to their instruction; affects the win rate, not "
        "'Checks passed'.",
    ),
    Figure(
        names=("words",),
        compute=lambda rows, seed: (sum(row["words"][0] for row in rows) / len(rows),),
        heading="Words",
        digits=1,
    ),
    Figure(
        names=("wins", "ties", "losses"),
        compute=_tally,
        heading="Wins / ties / losses",
        compared=True,
    ),
    Figure(
        names=("flips",),
        compute=lambda rows, seed: (sum(bool(row.get("flip")) for row in rows),),
        heading="Flips",
        help="verdicts that changed with the order of the answers, counted as ties.",
        compared=True,
    ),
    Figure(
        names=("parse_failures",),
        compute=lambda rows, seed: (
            sum(row["verdict"] is None and row.get("reason") != BOTH_EMPTY for row in rows),
        ),
        heading="Unparsable",
        compared=True,
    ),
    Figure(
        names=("length_bias",),
        compute=_length_bias,
        heading="Longer wins",
        help="share of decided verdicts that went to the longer answer; 0.50 is no preference for "
        "length.",
        compared=True,
    ),
    Figure(names=("prompts",), compute=lambda rows, seed: (len(rows),)),
    Figure(names=("by_constraint",), compute=_by_constraint),
)
