"""Draws bars with intervals."""

from typing import TYPE_CHECKING

from markupsafe import Markup

from zephyr_ray.formatting import number
from zephyr_ray.report.plots.figure import INK, LARGE, LETTERS, draw_figure, shorten_name, wrap
from zephyr_ray.section import Bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE_LINE = 0.2
"""Height of each additional title line in inches."""


def draw_interval_bars(block: Bars, colors: dict[str, str]) -> Markup:
    """Draws horizontal bars on a 0–1 axis with their intervals, and a dashed reference line."""
    label = f"{block.title}: " + "; ".join(
        f"{name} {number(bar.value)} from {number(bar.low)} to {number(bar.high)}"
        for name, bar in block.bars
    )

    series = block.series or [name for name, _ in block.bars]
    names = [shorten_name(name) for name, _ in block.bars]
    # The title begins to the right of the names.
    title = wrap(block.title, LARGE - max(map(len, names), default=0) / LETTERS)

    def paint(axes: "Axes") -> None:
        for position, (_, bar) in enumerate(block.bars):
            axes.barh(position, bar.value, color=colors[series[position]], height=0.62)
            axes.plot(
                [bar.low, bar.high], [position, position], color=INK, linewidth=1.6, marker="|"
            )
            axes.text(1.02, position, number(bar.value), va="center")
        if block.line is not None:
            axes.axvline(block.line, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_yticks(range(len(block.bars)), names)
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.set_title(title)

    height = 0.8 + 0.34 * len(block.bars) + TITLE_LINE * title.count("\n")
    return draw_figure(label, (LARGE, height), paint)
