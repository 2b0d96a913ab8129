"""Arranges what the stages contribute into the chapters of the page, and draws it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from zephyr_ray.formatting import number, signed
from zephyr_ray.report.plots import Palette, draw
from zephyr_ray.section import Block, Cell, Chapter, Column, Interval, Place, Section


@dataclass
class PageChapter:
    """A chapter of the page: what all stages contribute under one title."""

    title: str
    place: Place
    intros: list[str] = field(default_factory=list)
    parts: dict[str, list[tuple[str, list[Any]]]] = field(default_factory=dict)
    """By stage: runs of blocks of one type, as (name of the type, blocks or drawn plots)."""

    @property
    def id(self) -> str:
        return self.title.lower().replace(" ", "-")

    @property
    def appendix(self) -> bool:
        return self.place is Place.APPENDIX


def arrange(sections: dict[str, Section]) -> list[PageChapter]:
    """Merges chapters of the same title, orders them by place and draws their plots."""
    by_stage = [(stage, c) for stage, section in sections.items() for c in section.chapters]
    by_stage.sort(key=lambda item: item[1].place)
    colours = Palette()
    arranged: dict[str, PageChapter] = {}
    for stage, chapter in by_stage:
        merged = arranged.setdefault(chapter.title, PageChapter(chapter.title, chapter.place))
        if chapter.intro and chapter.intro not in merged.intros:
            merged.intros.append(chapter.intro)
        merged.parts[stage] = list(_runs(chapter, stage, colours))
    return list(arranged.values())


def _runs(chapter: Chapter, stage: str, colours: Palette) -> Iterator[tuple[str, list[Any]]]:
    for kind, run in groupby(chapter.blocks, key=type):
        blocks: list[Block] = list(run)
        yield kind.__name__.lower(), draw(blocks, stage, colours) or blocks


def cell(value: Cell, column: Column) -> Markup:
    """Formats a cell of a table. Everything is escaped."""
    if isinstance(value, str):
        return escape(value)

    def text(part: float | None) -> str:
        digits = column.digits or 0
        return signed(part, digits) if column.signed else number(part, digits)

    if isinstance(value, Interval):
        ends = f"[{text(value.low)}, {text(value.high)}]"
        return Markup("{} <small>{}</small>").format(text(value.value), ends)
    return escape(" / ".join(map(text, value)) if isinstance(value, tuple) else text(value))
