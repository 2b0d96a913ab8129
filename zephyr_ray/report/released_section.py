"""Builds the comparison of a run's figures with those of a released model or a paper."""

from collections.abc import Iterator
from itertools import combinations

from zephyr_ray.section import Bars, Block, Chapter, Column, Place, Section, Table, Text
from zephyr_ray.store import Artifact

Figures = dict[str, float]
"""Values by names of counts, such as win_rate/dpo."""
SAME, OPEN, DIFFERENT = "The same order here", "Not distinguished here", "The opposite order here"


def released_chapter(artifact: Artifact, section: Section, released: Figures) -> Chapter:
    """Returns a table of an artifact's figures beside the released ones, and whether the models of
    each figure have the same order. `section` is that of the artifact; its bars hold intervals."""
    bars = [
        block
        for chapter in section.chapters
        for block in chapter.blocks
        if isinstance(block, Bars) and block.figure
    ]
    intervals = {f"{b.figure}/{model}": interval for b in bars for model, interval in b.bars}
    counts = artifact.manifest.counts
    columns = (Column("Figure"), Column("This run", digits=3), Column("Released", digits=3))
    rows = tuple(
        (name, intervals.get(name, counts.get(name)), value) for name, value in released.items()
    )
    blocks: tuple[Block, ...] = (Table(columns, rows), *map(Text, _orders(bars, released)))
    return Chapter("Compared with released figures", Place.RESULT, blocks)


def _orders(bars: list[Bars], released: Figures) -> Iterator[str]:
    """Yields, for each figure of several models, which pairs of them have the released order."""
    for block in bars:
        figure, ours = block.figure, dict(block.bars)
        both = [model for model in ours if f"{figure}/{model}" in released]
        ranked = sorted(both, key=lambda model: -released[f"{figure}/{model}"])
        paired = block.paired
        pairs: dict[str, list[str]] = {SAME: [], OPEN: [], DIFFERENT: []}
        for better, worse in combinations(ranked, 2):
            a, b = ours[better], ours[worse]
            low, high = paired.get((better, worse), (a.low - b.high, a.high - b.low))
            verdict = SAME if low > 0 else DIFFERENT if high < 0 else OPEN
            pairs[verdict].append(f"{better} above {worse}")
        orders = ". ".join(f"{verdict}: {', '.join(p)}" for verdict, p in pairs.items() if p)
        if orders:
            rule = f"their difference in {figure} may be 0" if paired else "intervals overlap"
            note = f"Two models are not distinguished if {rule}."
            yield f"{figure}, released: {' > '.join(ranked)}. {orders}. {note}"
