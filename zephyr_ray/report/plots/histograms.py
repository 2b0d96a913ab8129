"""Draws histograms of scores on one scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from zephyr_ray.formatting import number, significant
from zephyr_ray.report.plots.figure import SMALL, draw_figure, shorten_name
from zephyr_ray.section import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Bins:
    """Bins of equal width, for the scores of neighboring histograms."""

    low: float
    width: float
    number: int

    @staticmethod
    def of(histograms: Sequence[Histogram]) -> "Bins":
        """Returns one bin per whole number if all scores are from 1 to the best possible; halves
        round up. Scores on another scale get ten bins between the lowest and the highest score."""
        scores = [score for block in histograms for score in block.scores]
        low, high = min(scores, default=1), max(scores, default=1)
        best = max((block.highest for block in histograms), default=1)
        if low >= 1 and high <= best:
            return Bins(0.5, 1, best)
        return Bins(low, (high - low) / 10 or 1, 10)

    def count(self, scores: Sequence[float]) -> list[int]:
        """Returns how many of the scores are in each bin."""
        counts = [0] * self.number
        for score in scores:
            counts[min(self.number - 1, int((score - self.low) / self.width))] += 1
        return counts

    def names(self) -> list[str]:
        """Returns the middle of each bin."""
        middles = (self.low + (n + 0.5) * self.width for n in range(self.number))
        return [significant(middle) for middle in middles]


def draw_histogram(block: Histogram, bins: Bins, top_count: int, color: str) -> Markup:
    """Draws how often each score was given; `top_count` is the highest count among neighboring
    histograms, which share a scale."""
    times, names = bins.count(block.scores), bins.names()
    mean = number(sum(block.scores) / len(block.scores), 1 if bins.width >= 1 else 2)
    small = max(map(len, names)) > 2
    counted = ", ".join(f"scores around {n}: {c}" for n, c in zip(names, times, strict=True))
    label = f"{block.title}: {counted}"

    def paint(axes: "Axes") -> None:
        axes.bar(range(bins.number), times, color=color, width=0.8)
        axes.set_xticks(range(bins.number), names, fontsize=7 if small else None)
        axes.set_ylim(0, top_count * 1.08)
        axes.grid(axis="y")
        axes.set_title(f"{shorten_name(block.title, 36)}\nmean {mean}, {len(block.scores)} answers")

    return draw_figure(label, (SMALL, 2.1), paint)
