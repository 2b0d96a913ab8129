"""Defines what a stage's artifact contributes to the report: typed values, without markup.

A stage returns a `Section`; the report draws whatever is in it. A stage kind with a new figure, or
a new stage kind, needs no change in the report.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal


class Place(IntEnum):
    """Position of a chapter on the page, from the top."""

    OVERVIEW = 0
    RESULT = 1
    PROCESS = 2
    SAMPLES = 3
    APPENDIX = 4
    """Below the tables of stages and settings."""


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    soft: bool = False
    """Whether it explains instead of reporting a finding."""


@dataclass(frozen=True)
class Pair:
    """Names a row of differences: its signed numbers are the values of `a` minus those of `b`."""

    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.a} − {self.b}"


Cell = str | Pair | int | float | tuple[int | float, ...] | Interval | None


@dataclass(frozen=True)
class Column:
    heading: str
    digits: int | None = None
    """Decimals of its numbers; None for a column of text."""
    signed: bool = False
    """Whether its numbers have a plus or minus sign."""
    shaded: bool = False
    """Whether each cell is shaded by its value, 0 to 1."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    help: tuple[str, ...] = ()
    """Explanations of its columns, shown below it."""


@dataclass(frozen=True)
class Bars:
    """One horizontal bar from 0 to 1 per name, with its interval."""

    title: str
    bars: tuple[tuple[str, Interval], ...]
    line: float | None = None
    """A value to compare the bars with."""
    figure: str = ""
    """First part of the names of the counts shown, figure/bar name; empty if there are none."""
    series: tuple[str, ...] = ()
    """A series per bar; bars of one series share a color. Empty if each bar has its own color."""
    differences: tuple[tuple[str, str, Interval], ...] = ()
    """Paired differences between bars: the first minus the second."""

    @property
    def paired(self) -> dict[tuple[str, str], tuple[float, float]]:
        """The ends of the intervals of the differences, in both directions."""
        ends = {(a, b): (d.low, d.high) for a, b, d in self.differences}
        return ends | {(b, a): (-high, -low) for (a, b), (low, high) in ends.items()}


@dataclass(frozen=True)
class Curve:
    """One value over the steps of a stage."""

    title: str
    points: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...] = ()
    """Values on held-out data."""


@dataclass(frozen=True)
class Curves:
    """One value over the steps of several runs."""

    title: str
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    """Points by the name of their run."""


@dataclass(frozen=True)
class Trend:
    """Values with their intervals over the values of a setting."""

    title: str
    setting: str
    series: tuple[tuple[str, tuple[tuple[str | float, Interval], ...]], ...]
    """Points, as (value of the setting, outcome), by the name of their series."""
    line: float | None = None
    """A value to compare the outcomes with."""


@dataclass(frozen=True)
class Histogram:
    """Counts of scores."""

    title: str
    scores: tuple[float, ...]
    highest: int = 10
    """Best score on a scale from 1; scores outside this range are taken to be on another scale."""


@dataclass(frozen=True)
class Scatter:
    """Points, one color per series."""

    title: str
    x: str
    """Label of the horizontal axis."""
    y: str
    """Label of the vertical axis."""
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    """Points by the name of their series."""


@dataclass(frozen=True)
class Radar:
    """One polygon per series over the axes of a circle."""

    title: str
    axes: tuple[str, ...]
    series: tuple[tuple[str, tuple[float | None, ...]], ...]
    """A value per axis by the name of the series; None if unknown."""
    lowest: float = 0.0
    highest: float = 1.0


@dataclass(frozen=True)
class Answer:
    """One model's answer in a sample."""

    model: str
    text: str
    outcome: Literal["win", "tie", "loss"] | None = None
    facts: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers to it, side by side."""

    prompt: str
    answers: tuple[Answer, ...]
    """If they have outcomes, the first is the baseline that the others were compared with."""
    kind: str = ""
    """Kind of the prompt, such as its constraint or category, to filter by; empty if none."""


@dataclass(frozen=True)
class Document:
    """An HTML page of its own, shown in a sandboxed frame."""

    html: str


Block = (
    Text | Table | Bars | Curve | Curves | Trend | Histogram | Scatter | Radar | Sample | Document
)


@dataclass(frozen=True)
class Chapter:
    """Blocks under one heading; chapters of several stages with the same title become one."""

    title: str
    place: Place
    blocks: tuple[Block, ...]
    intro: str = ""
    """Explanation for all stages; if chapters share a title, the first explanation is shown."""


@dataclass(frozen=True)
class Section:
    """Everything that one artifact contributes to the report."""

    chapters: tuple[Chapter, ...]
    headline: str = ""
    """The finding in a sentence or two. The report opens with the headline of its last stage."""
