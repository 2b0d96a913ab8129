"""Draws points, one color per series."""

from typing import TYPE_CHECKING

from markupsafe import Markup

from zephyr_ray.formatting import number
from zephyr_ray.report.plots.figure import LARGE, add_legend, draw_figure, legend_height, wrap
from zephyr_ray.section import Scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import PathPatch

Points = tuple[tuple[float, float], ...]
POINT = 6.0
"""Diameter of a dot in typographic points."""


def draw_scatter(block: Scatter, colors: dict[str, str]) -> Markup:
    """Draws the points of all series; the description gives their number and means."""
    described = []
    for name, points in block.series:
        means = [number(sum(v) / len(v)) for v in map(list, zip(*points, strict=True))]
        mean = f", on average {block.x} {means[0]} and {block.y} {means[1]}" if points else ""
        described.append(f"{name} {len(points)} points{mean}")
    label = f"{block.title}: " + "; ".join(described)

    def paint(axes: "Axes") -> None:
        for name, points in block.series:
            axes.add_patch(_dots(points, colors[name]))
            axes.plot([], [], "o", color=colors[name], label=name)  # for the legend
        axes.autoscale_view()
        axes.margins(0.04)
        axes.grid()
        axes.set_xlabel(block.x)
        axes.set_ylabel(block.y)
        axes.set_title(wrap(block.title, LARGE))
        if len(block.series) > 1:
            add_legend(axes, len(block.series))

    return draw_figure(label, (LARGE, 2.9 + legend_height(len(block.series))), paint)


def _dots(points: Points, color: str) -> "PathPatch":
    """Returns one path for all dots, a tenth of the size of one element per dot. A zero-length line
    with round ends is a dot."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    ends = [point for point in points for _ in range(2)]
    path = Path(ends or [(0, 0)], [Path.MOVETO, Path.LINETO] * len(points) or [Path.MOVETO])
    path.should_simplify = False
    return PathPatch(
        path, fill=False, edgecolor=color, linewidth=POINT, capstyle="round", alpha=0.8
    )
