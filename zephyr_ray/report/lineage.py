"""Draws the pipeline: a box per stage with its time, cost and rows, below its source stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from zephyr_ray.formatting import dollars, duration, number
from zephyr_ray.report.layout import Item, Layout, Line, lay_out
from zephyr_ray.report.plots.figure import shorten_name
from zephyr_ray.report.summary import StageSummary

BOX, LANE = 150, 16
"""Widths of a box and of a lane, in pixels."""
GAP, ROW_GAP = 14, 26
"""Space between two boxes, and between two rows."""
LINE = 16
"""Height of a line of text."""
LONGEST_NAME = 19
"""Maximum characters of a name in a box."""


@dataclass(frozen=True)
class Picture:
    """A layout, and the height of its boxes in pixels."""

    layout: Layout
    box: int

    @property
    def height(self) -> int:
        return len(self.layout.rows) * (self.box + ROW_GAP) - ROW_GAP + 2

    def place(self, item: Item) -> tuple[float, int]:
        """Returns the middle of an item's upper edge."""
        return self.layout.middles[item], item.row * (self.box + ROW_GAP) + 1

    def draw_line(self, line: Line) -> Markup:
        (x1, y1), (x2, y2) = map(self.place, line)
        y1 += self.box
        bend = (y1 + y2) // 2
        return Markup(f'<path d="M{x1:.0f} {y1}C{x1:.0f} {bend} {x2:.0f} {bend} {x2:.0f} {y2}"/>')

    def draw_lane(self, item: Item) -> Markup:
        x, y = self.place(item)
        return Markup(f'<path d="M{x:.0f} {y}v{self.box}"/>')

    def draw_box(self, item: Item, stage: StageSummary, share: float) -> Markup:
        """Draws a stage; `share` is how dark its box is, from 0 to 1."""
        middle, top = self.place(item)
        left = middle - BOX / 2
        rows = f"{number(stage.rows)} rows" if stage.rows is not None else ""
        paid = dollars(stage.paid) if stage.paid else ""
        facts = [fact for fact in (duration(stage.seconds), rows) if fact]
        made_from = f"made from {', '.join(stage.reads)}" if stage.reads else ""
        label = ", ".join(filter(None, (stage.kind, *facts, paid, made_from)))
        lines = [" · ".join(facts), *filter(None, [paid])]
        texts = Markup().join(
            Markup('<text x="{:.0f}" y="{}">{}</text>').format(left + 10, top + 36 + LINE * n, text)
            for n, text in enumerate(lines)
        )
        return Markup(
            '<a href="#stage-{name}" aria-label="{name}: {label}">'
            '<rect x="{x:.0f}" y="{y}" width="{w}" height="{h}" rx="7" '
            'style="--share: {share:.2f}"/>'
            '<text x="{tx:.0f}" y="{ty}" class="name">{short}</text>{texts}</a>'
        ).format(
            name=stage.name,
            label=label,
            x=left,
            y=top,
            w=BOX,
            h=self.box,
            share=share,
            tx=left + 10,
            ty=top + 19,
            short=shorten_name(stage.name, LONGEST_NAME),
            texts=texts,
        )


def draw_pipeline(stages: Sequence[StageSummary], most: int) -> Markup:
    """Draws the stages, at most `most` per row. Each box links to a row of the page's table."""
    by_name: dict[str, StageSummary] = {}
    reads: dict[str, list[str]] = {}
    for stage in stages:
        reads[stage.name] = [source for source in stage.reads if source in by_name]
        by_name[stage.name] = stage
    layout = lay_out(reads, most, BOX + GAP, LANE)
    picture = Picture(layout, 44 + LINE * any(stage.paid for stage in stages))
    longest = max((stage.seconds for stage in stages), default=0) or 1
    items = [item for row in layout.rows for item in row]
    lines = [picture.draw_line(line) for line in layout.lines]
    lines += [picture.draw_lane(item) for item in items if item.is_lane]
    boxes = [
        picture.draw_box(item, by_name[item.name], by_name[item.name].seconds / longest)
        for item in items
        if not item.is_lane
    ]
    return Markup(
        '<svg class="pipeline" viewBox="0 0 {w:.0f} {h}" width="{w:.0f}" height="{h}" role="group" '
        'aria-label="{n} stages, each below the stages it was made from">'
        '<g class="lines" aria-hidden="true">{lines}</g>{boxes}</svg>'
    ).format(
        w=layout.width,
        h=picture.height,
        n=len(stages),
        lines=Markup().join(lines),
        boxes=Markup().join(boxes),
    )
