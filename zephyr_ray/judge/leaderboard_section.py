"""Builds what a leaderboard contributes to the report: table, win matrix and headline."""

import json
from collections.abc import Iterator
from typing import Any

from zephyr_ray.formatting import number, with_interval
from zephyr_ray.judge.bradley_terry import ANCHOR
from zephyr_ray.section import (
    Block,
    Cell,
    Chapter,
    Column,
    Interval,
    Pair,
    Place,
    Section,
    Table,
    Text,
)
from zephyr_ray.store import Artifact

Result = dict[str, Any]
"""The content of result.json, or a part of it."""
SCALE = (
    "Rating: Bradley-Terry, a tie counts one half, on the Elo scale: a lead of 100 points is an "
    "expected win rate of 0.64, a lead of 200 points 0.76. Brackets are 95% intervals, with all "
    "comparisons on one prompt as one cluster."
)
RANKS = (
    "Rank: in parentheses, the ranks that the 95% intervals of the differences between ratings "
    "allow; models without a rating have none."
)
LEFT_OUT = (
    "Left out: comparisons without a verdict, because an answer is missing, both are empty, or the "
    "judge's reply is unparsable."
)
CONTROLLED = (
    "Ratings are those of answers of equal length and Markdown. The effects of style are fitted "
    "together with them, for this judge and these answers."
)
EFFECTS = (
    "Points that the root mean square of the difference is worth to the answer with more of it. "
    "Length is (a − b) / (a + b) in characters; the others are counts per character."
)
MATRIX = "Share of the comparisons with the column's model that the row's model won."


def leaderboard_section(artifact: Artifact) -> Section:
    result = json.loads(artifact.file("result.json").read_text(encoding="utf-8"))
    judges = ", ".join(f"“{judge}”" for judge in dict.fromkeys(result["judges"].values()))
    intro = (
        f"{number(result['prompts'])} prompts of {', '.join(result['judges'])}, judged by "
        f"{judges}; “{result['anchor']}” has the rating {_points(ANCHOR)} by definition."
    )
    blocks: tuple[Block, ...] = (
        Text(intro, soft=True),
        *(Text(note) for note in result["notes"]),
        _table(result),
        *_differences(result),
        _matrix(result),
        *_style(result),
    )
    return Section((Chapter("Leaderboard", Place.RESULT, blocks),), headline(result))


def headline(result: Result) -> str:
    """Says which model leads, by how much, and whether that may be chance."""
    rated = [model for model, row in result["models"].items() if row["rating"] is not None]
    reasons = {m: row["reason"] for m, row in result["models"].items() if row["rating"] is None}
    parts = [f"{m} {reason}, so it has no rating" for m, reason in reasons.items()]
    if len(rated) > 1:
        first, second = rated[:2]
        whom = " the others" if parts else ""
        lead = f"{first} leads{whom} with a rating of {_rating(result['models'][first])}"
        pair = _pair(result, first, second)
        ahead = f"{_points(pair['difference'])} points ahead of {second}"
        if pair["low"] is None:
            ahead += ", with unknown uncertainty"
        else:
            chance = ", which may be chance" if pair["low"] <= 0 else ""
            ahead += f" [{_points(pair['low'])}, {_points(pair['high'])}]{chance}"
        parts += [lead, ahead]
    return " ".join([f"{'; '.join(parts)}.", *result["notes"]]) if parts else ""


def _table(result: Result) -> Table:
    style = [Column("Without style control", digits=0)] if result["style_controlled"] else []
    rows = []
    for model, row in result["models"].items():
        cells: list[Cell] = [model, _rank(row), row.get("reason") or _cell(row, "rating")]
        if style:
            cells.append(_cell(row["uncontrolled"], "rating") if "uncontrolled" in row else None)
        rows.append((*cells, row["judgements"], row["left_out"]))
    columns = (
        *(Column("Model"), Column("Rank"), Column("Rating", digits=0), *style),
        *(Column("Judgements", digits=0), Column("Left out", digits=0)),
    )
    notes = (SCALE, RANKS, LEFT_OUT, *([CONTROLLED] if style else []))
    return Table(columns, tuple(rows), help=notes)


def _differences(result: Result) -> Iterator[Table]:
    """Yields the differences between models that are neighbors in the ranking."""
    rated = [model for model, row in result["models"].items() if row["rating"] is not None]
    neighbors = list(zip(rated, rated[1:], strict=False))
    if neighbors:
        columns = (Column("Models"), Column("Difference", digits=0, signed=True))
        rows = tuple((Pair(a, b), _cell(_pair(result, a, b), "difference")) for a, b in neighbors)
        yield Table(columns, rows, "Differences between neighbors")


def _matrix(result: Result) -> Table:
    models = list(result["models"])
    shares: dict[tuple[str, str], float] = {}
    for pair in result["pairs"]:
        if pair["win_rate"] is not None:
            shares[pair["a"], pair["b"]] = pair["win_rate"]
            shares[pair["b"], pair["a"]] = 1 - pair["win_rate"]
    rows = tuple((a, *(shares.get((a, b)) for b in models)) for a in models)
    columns = (Column("Model"), *(Column(model, digits=2, shaded=True) for model in models))
    return Table(columns, rows, "Win rates", help=(MATRIX,))


def _style(result: Result) -> Iterator[Table]:
    if result["style_controlled"]:
        columns = (Column("Style"), Column("Points", digits=0, signed=True))
        rows = tuple((name, _cell(e, "points")) for name, e in result["style"].items())
        yield Table(columns, rows, "Effects of style on verdicts", help=(EFFECTS,))


def _pair(result: Result, a: str, b: str) -> Result:
    """Returns the entry of a pair whose first model ranks higher."""
    pair: Result = next(p for p in result["pairs"] if (p["a"], p["b"]) == (a, b))
    return pair


def _cell(figures: Result, name: str) -> Cell:
    value, low, high = figures[name], figures["low"], figures["high"]
    return value if low is None else Interval(value, low, high)


def _rank(row: Result) -> str | None:
    if row["rank"] is None:
        return None
    best, worst = row["best_rank"], row["worst_rank"]
    return str(row["rank"]) if best == worst else f"{row['rank']} ({best}–{worst})"


def _rating(row: Result) -> str:
    if row["low"] is None:
        return _points(row["rating"])
    return with_interval(row["rating"], row["low"], row["high"], _points)


def _points(value: float) -> str:
    return number(value, 0)
