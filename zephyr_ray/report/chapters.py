"""Arranges the contributions of stages into the chapters of the page, and draws their plots."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import cycle, groupby
from typing import Any

from zephyr_ray.report.plots import draw
from zephyr_ray.report.plots.figure import COLORS
from zephyr_ray.section import Bars, Block, Place, Radar, Sample, Scatter, Section


@dataclass(frozen=True)
class Filters:
    """Values by which the samples of a chapter can be filtered."""

    samples: int
    """Number of samples to choose from."""
    models: list[str]
    outcomes: list[str]
    kinds: list[str]


@dataclass
class PageChapter:
    """Contributions of all stages under one title."""

    title: str
    place: Place
    intro: str = ""
    parts: dict[str, list[tuple[str, list[Any]]]] = field(default_factory=dict)
    """Runs of blocks of one kind, as (name of the kind, blocks or drawn plots), by stage."""

    @property
    def has_samples(self) -> bool:
        """Whether the chapter is about samples; samples in other chapters are collapsed."""
        return self.place == Place.SAMPLES

    @property
    def filters(self) -> Filters | None:
        """Filters of its samples; None if it is not about samples or has fewer than two."""
        runs = (run for part in self.parts.values() for run in part)
        samples: list[Sample] = [
            block for name, blocks in runs if name == "sample" for block in blocks
        ]
        if not self.has_samples or len(samples) < 2:
            return None
        answers = [answer for sample in samples for answer in sample.answers]
        given = {answer.outcome for answer in answers}
        return Filters(
            samples=len(samples),
            models=list(dict.fromkeys(answer.model for answer in answers)),
            outcomes=[outcome for outcome in ("win", "tie", "loss") if outcome in given],
            kinds=sorted({sample.kind for sample in samples} - {""}),
        )


def last_first(stages: Iterable[str], originals: Mapping[str, str]) -> list[str]:
    """Orders stages as pages list their findings and results: the last stage first, because it
    measures what the others made, but the variants of a stage in the order of the sweep.
    `originals` has the names that stages had before the sweep."""
    by_original = groupby(stages, key=lambda name: originals.get(name, name))
    variants = [list(names) for _, names in by_original]
    return [name for names in reversed(variants) for name in names]


def arrange(sections: dict[str, Section], originals: Mapping[str, str]) -> list[PageChapter]:
    """Merges chapters of the same title, orders them by place and draws their plots. Results are in
    the order of `last_first`, other chapters in that of the stages."""
    results = last_first(sections, originals)
    by_stage = [
        (stage, chapter)
        for place in Place
        for stage in (results if place == Place.RESULT else sections)
        for chapter in sections[stage].chapters
        if chapter.place == place
    ]
    # One color per model or stage, the same in every plot, in order of appearance.
    colors: defaultdict[str, str] = defaultdict(cycle(COLORS).__next__)
    arranged: dict[str, PageChapter] = {}
    for stage, chapter in by_stage:
        merged = arranged.setdefault(chapter.title, PageChapter(chapter.title, chapter.place))
        merged.intro = merged.intro or chapter.intro
        runs = [(kind, list(run)) for kind, run in groupby(chapter.blocks, key=_kind)]
        merged.parts.setdefault(stage, []).extend(
            (kind, draw(blocks, stage, colors) or blocks) for kind, blocks in runs
        )
    return list(arranged.values())


def _kind(block: Block) -> str:
    """Returns the name of a block's type; large plots share a name and a grid."""
    return "large" if isinstance(block, Bars | Radar | Scatter) else type(block).__name__.lower()
