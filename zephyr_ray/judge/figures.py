"""Lists the figures of a comparison: how each is computed from judged rows and how it is shown.

result.json, the manifest's counts, and the report's tables and bars follow from FIGURES. A new
figure is one entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zephyr_ray.judge import measures
from zephyr_ray.judge.length_control import MIN_PROMPTS
from zephyr_ray.judge.measures import Row, parsed
from zephyr_ray.section import Cell, Interval


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
    signed: bool = False
    """Whether the report shows a plus or minus sign."""
    compared: bool = False
    """Whether it compares with the baseline; the baseline then has no value."""
    behind: bool = False
    """Whether it explains how the win rate came about; its column is then in a separate table."""
    interval: bool = False
    """Whether its first three values are (rate, low, high), or None for each."""
    plot: str = ""
    """Title of its bar chart; empty for none. A figure with a chart has an interval, and its rate
    is also a manifest count."""

    def cell(self, model: str, result: dict[str, Any]) -> Cell:
        """Returns the cell of one model; `result` may be from a version without this figure."""
        if self.compared and model == result["baseline"]:
            return "baseline" if self.plot else None
        names = self.names[:3] if self.plot or self.interval else self.names
        values = tuple(result["models"][model].get(name) for name in names)
        if None in values:
            return None
        if self.plot or self.interval:
            return Interval(*values)
        return values if len(values) > 1 else values[0]


def summary(rows: list[Row], seed: int) -> dict[str, Any]:
    """Computes every figure of one model from its judged rows."""
    return {
        name: value
        for figure in FIGURES
        for name, value in zip(figure.names, figure.compute(rows, seed), strict=True)
    }


def coverage(rows: list[Row], asked: int) -> dict[str, Any]:
    """Computes how many of the prompts of the comparison (`asked`) a model's win rate includes."""
    with_verdict = len(parsed(rows))
    return {
        "asked": asked,
        "left_out": asked - with_verdict,
        "coverage": with_verdict / asked,
    }


def left_out(figures: dict[str, Any]) -> int:
    """Returns how many prompts a model's win rate leaves out. Results of earlier versions count
    only unparsable replies."""
    return figures.get("left_out", figures.get("parse_failures", 0))


def read(figures: dict[str, Any]) -> int:
    """Returns how many prompts a model's win rate includes."""
    if "asked" in figures:
        return figures["asked"] - figures["left_out"]
    return figures.get("prompts", 0) - figures.get("parse_failures", 0)


FIGURES = (
    Figure(
        names=("win_rate", "low", "high"),
        compute=measures.win_rate,
        heading="Win rate",
        compared=True,
        plot="Win rate against {baseline}",
    ),
    Figure(
        names=(
            *("length_controlled", "length_controlled_low", "length_controlled_high"),
            "length_control_obstacle",
        ),
        compute=measures.length_control,
        heading="At equal length",
        help="length-controlled win rate: what the win rate would be if both answers had the same "
        "number of characters (AlpacaEval 2's formula; interval clustered by prompt). Needs "
        f"{MIN_PROMPTS} prompts.",
        compared=True,
        plot="Win rate against {baseline} at equal length",
    ),
    Figure(
        names=("length_control_move",),
        compute=measures.length_control_move,
        heading="Move",
        help="the rate at equal length minus the win rate.",
        signed=True,
        compared=True,
    ),
    Figure(
        names=("pass_rate", "pass_low", "pass_high"),
        compute=measures.pass_rate,
        heading="Checks passed",
        help="share of answers that ended by themselves, satisfy their constraint and do not loop. "
        "The rules judge's score is 1 + 9 × the share of all checks, including on-topic, that an "
        "answer passes. Rules check form, not truth: a wrong answer in the right form passes.",
        plot="Checks passed",
    ),
    Figure(
        names=("on_topic",),
        compute=measures.on_topic,
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
        names=("leaks_role",),
        compute=measures.share("leaks_role"),
        heading="Role markers",
        help="share of answers with a marker of another turn, such as <|user|> or a line that "
        "begins with “User:”.",
    ),
    Figure(
        names=("cut",),
        compute=measures.share("cut"),
        heading="Did not stop",
        help="share of answers that reached the maximum number of tokens.",
    ),
    Figure(
        names=("wins", "ties", "losses"),
        compute=measures.tally,
        heading="Wins / ties / losses",
        compared=True,
        behind=True,
    ),
    Figure(
        names=("flips",),
        compute=measures.flips,
        heading="Flips",
        help="prompts where a different answer won after the order of the answers was swapped.",
        compared=True,
        behind=True,
    ),
    Figure(
        names=("parse_failures",),
        compute=measures.unparsable,
        heading="Unparsable",
        compared=True,
        behind=True,
    ),
    Figure(
        names=("first_position", "first_position_low", "first_position_high", "orders_read"),
        compute=measures.first_position,
        heading="First position",
        help="share of the win that went to the answer shown first; 0.50 means no preference for a "
        "position. Both orders are judged, so such a preference cancels out in the win rate.",
        compared=True,
        behind=True,
        interval=True,
    ),
    Figure(
        names=("length_bias",),
        compute=measures.longer_wins,
        heading="Longer wins",
        help="share of decided verdicts that went to the longer answer; 0.50 means no preference "
        "for length.",
        compared=True,
        behind=True,
    ),
    Figure(names=("standard_error",), compute=measures.standard_error),
    Figure(names=("prompts",), compute=lambda rows, seed: (len(rows),)),
    Figure(names=("by_constraint",), compute=measures.by_constraint),
)
