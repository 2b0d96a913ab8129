"""Writes the report: one self-contained HTML page about a run."""

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import cycle, groupby
from pathlib import Path
from typing import Annotated, Any

from markupsafe import Markup, escape

from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import describe_model, duration, number, signed
from zephyr_ray.report.plots import COLORS, draw, draw_time_bars
from zephyr_ray.report.sweep_section import sweep_section
from zephyr_ray.section import Cell, Chapter, Column, Interval, Place, Section, Table
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import Artifact

TEMPLATE = Path(__file__).with_name("template.html")
LONGEST_TEXT = 2000
"""Maximum characters of a text on the page."""
TROUBLE = (
    *("dropped", "failed", "truncated", "flips", "parse_failures", "unparsable", "over_long"),
    *("empty", "both_empty", "short_of_count"),
)
"""Prefixes of counts that the page lists with failed and dropped rows."""


class Report(Stage):
    """A stage that reports on other stages in one page, `report.html`."""

    kind = "report"
    makes = "report"
    view = ("report.html", "report.html")
    reads_lineage = True

    of: Annotated[list[str], Reads("any")]
    """The stages to report on; those they depend on are included."""
    title: str = "Zephyr"
    released: Annotated[dict[str, dict[str, float]], ADDED] = {}
    """Figures of a released model to show beside this run's, by stage and name of its count."""

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        for name in self.released:
            # The name of a sweep's variant begins with that of its stage.
            if not any(stage == name or stage.startswith(f"{name}-") for stage in self.of):
                raise Permanent(
                    f"released: the report is not about '{name}'; write a stage that `of` lists"
                )

    def run(self, work: Work) -> None:
        work.progress.unit = "page"
        contributed = {
            name: section
            for name, artifact in work.inputs.items()
            if (section := work.stages[name].section(artifact))
        }
        for name, artifact in work.inputs.items():
            original = work.variants[name].of if name in work.variants else name
            if figures := self.released.get(original):
                section = contributed.get(name, Section(()))
                chapter = compare(artifact, figures)
                contributed[name] = replace(section, chapters=(chapter, *section.chapters))
        # The last section, because the page opens with its headline. No stage has an empty name.
        if sweep := sweep_section(work.variants, contributed):
            contributed[""] = sweep
        page = render(self.title, work.inputs, contributed)
        (work.folder / "report.html").write_text(page, encoding="utf-8")
        work.progress.done = 1

    def expected(self, rows: dict[str, int]) -> int | None:
        return 1


def compare(artifact: Artifact, released: dict[str, float]) -> Chapter:
    """Returns the table of an artifact's counts and the figures of a released model."""
    counts = artifact.manifest.counts
    columns = (Column("figure"), Column("this run", digits=3), Column("released", digits=3))
    rows = tuple((name, counts.get(name), value) for name, value in released.items())
    return Chapter("Compared with the released model", Place.RESULT, (Table(columns, rows),))


def render(title: str, inputs: dict[str, Artifact], sections: dict[str, Section]) -> str:
    """Renders the page. The template escapes all text from models and data."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number, duration=duration, format_cell=format_cell, truncate_text=truncate_text
    )
    stages = [summarize_stage(name, artifact) for name, artifact in inputs.items()]
    seconds = {row["name"]: row["seconds"] for row in stages if row["seconds"]}
    headlines = [section.headline for section in sections.values() if section.headline]
    chapters = arrange(sections)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        date=date.today().isoformat(),
        headline=headlines[-1] if headlines else "",
        chapters=[chapter for chapter in chapters if chapter.place < Place.APPENDIX],
        appendix=[chapter for chapter in chapters if chapter.place == Place.APPENDIX],
        stages=stages,
        wall_time=draw_time_bars(seconds) if seconds else None,
        total_seconds=sum(seconds.values()),
    )


@dataclass
class PageChapter:
    """Contributions of all stages under one title."""

    title: str
    place: Place
    intro: str = ""
    parts: dict[str, list[tuple[str, list[Any]]]] = field(default_factory=dict)
    """Runs of blocks of one type, as (name of the type, blocks or drawn plots), by stage."""


def arrange(sections: dict[str, Section]) -> list[PageChapter]:
    """Merges chapters of the same title, orders them by place and draws their plots."""
    by_stage = [(stage, c) for stage, section in sections.items() for c in section.chapters]
    by_stage.sort(key=lambda item: item[1].place)
    # One color per model or stage, the same in every plot, in order of appearance.
    colors: dict[str, str] = defaultdict(cycle(COLORS).__next__)
    arranged: dict[str, PageChapter] = {}
    for stage, chapter in by_stage:
        merged = arranged.setdefault(chapter.title, PageChapter(chapter.title, chapter.place))
        merged.intro = merged.intro or chapter.intro
        runs = [(kind, list(run)) for kind, run in groupby(chapter.blocks, key=type)]
        merged.parts[stage] = [
            (kind.__name__.lower(), draw(blocks, stage, colors) or blocks) for kind, blocks in runs
        ]
    return list(arranged.values())


def format_cell(value: Cell, column: Column) -> Markup:
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


def summarize_stage(name: str, artifact: Artifact) -> dict[str, Any]:
    """Collects the values that the page's tables show for one stage; any may be missing."""
    manifest = artifact.manifest
    counts, examples = manifest.counts, manifest.examples
    trouble = {k: v for k, v in counts.items() if k.removeprefix("validation/").startswith(TROUBLE)}
    return {
        "name": name,
        **{k: getattr(manifest, k) for k in ("kind", "key", "seconds", "attempts")},
        "created": manifest.created[:16].replace("T", " "),
        "settings": {k: _text(v) for k, v in manifest.settings.items()}
        | {f"model {n}": describe_model(spec) for n, spec in manifest.models.items()},
        "reads": manifest.reads,
        "rows": counts.get("rows"),
        "counts": {k: _whole(v) for k, v in counts.items() if k != "rows" and k not in trouble},
        "trouble": [
            {
                "what": what,
                "count": trouble.get(what),
                "examples": [truncate_text(_text(value)) for value in examples.get(what, [])],
            }
            for what in sorted({*trouble, *examples})
            if trouble.get(what) or examples.get(what)
        ],
    }


def truncate_text(text: str) -> str:
    """Truncates a text that is too long, and states how many characters are missing."""
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]} … ({more} more characters)"


def _whole(value: float) -> float:
    """Converts a count such as 11.0 to an integer; leaves 0.0 and 1.0, which may be shares."""
    return int(value) if float(value).is_integer() and not 0 <= value <= 1 else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
