"""Renders the page from its parts, as one file that makes no requests."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from markupsafe import Markup, escape

from zephyr_ray.formatting import dollars, duration, number, signed
from zephyr_ray.report.chapters import PageChapter, last_first
from zephyr_ray.report.lineage import draw_pipeline
from zephyr_ray.report.summary import StageSummary, truncate_text
from zephyr_ray.section import Cell, Column, Interval, Pair, Place, Section

FOLDER = Path(__file__).parent
WIDE, NARROW = 6, 2
"""Maximum boxes per row of the pipeline, on a wide screen and on a phone."""


@dataclass(frozen=True)
class Fact:
    """A named line at the top of the page."""

    name: str
    text: str


def collect_findings(sections: dict[str, Section], originals: Mapping[str, str]) -> list[Fact]:
    """Returns the headlines of stages in the order of `last_first`."""
    findings = (Fact(name, sections[name].headline) for name in last_first(sections, originals))
    return [finding for finding in findings if finding.text]


def render(
    title: str,
    findings: Sequence[Fact],
    facts: Sequence[Fact],
    stages: Sequence[StageSummary],
    chapters: Sequence[PageChapter],
) -> str:
    """Renders the page. The first finding is its verdict, and the others are listed below it. The
    template escapes all text from models and data."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        dollars=dollars,
        duration=duration,
        format_cell=format_cell,
        shade=shade,
        truncate_text=truncate_text,
    )
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    return environment.get_template("template.html").render(
        title=title,
        date=date.today().isoformat(),
        policy=content_policy(script),
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        findings=findings,
        facts=facts,
        chapters=[chapter for chapter in chapters if chapter.place < Place.APPENDIX],
        appendix=[chapter for chapter in chapters if chapter.place == Place.APPENDIX],
        stages=stages,
        pictures={"wide": draw_pipeline(stages, WIDE), "narrow": draw_pipeline(stages, NARROW)},
        total_seconds=sum(stage.seconds for stage in stages),
        total_paid=sum(stage.paid for stage in stages),
    )


def content_policy(script: str) -> str:
    """Returns the content security policy of a page that runs this script; it allows no other
    script and no request."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def format_cell(value: Cell, column: Column) -> Markup:
    """Formats a cell of a table as HTML. Everything is escaped."""
    if not isinstance(value, Interval):
        return escape(cell_text(value, column))
    middle, ends = _interval_texts(value, column)
    return Markup("{} <small>{}</small>").format(middle, ends)


def cell_text(value: Cell, column: Column) -> str:
    """Formats a cell of a table without markup."""
    if isinstance(value, str | Pair):
        return str(value)
    if isinstance(value, Interval):
        return " ".join(_interval_texts(value, column))
    if isinstance(value, tuple):
        return " / ".join(cell_text(part, column) for part in value)
    digits = column.digits or 0
    return signed(value, digits) if column.signed else number(value, digits)


def _interval_texts(value: Interval, column: Column) -> tuple[str, str]:
    """Returns the value of an interval, and its ends in brackets."""
    middle, low, high = (cell_text(v, column) for v in (value.value, value.low, value.high))
    return middle, f"[{low}, {high}]"


def shade(value: Cell) -> float | None:
    """Returns how strongly to shade a cell, from 0 to 1; None if it has no single number."""
    value = value.value if isinstance(value, Interval) else value
    return min(max(float(value), 0), 1) if isinstance(value, int | float) else None
