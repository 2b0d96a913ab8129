"""Draws one polygon per series over the axes of a circle."""

import math
import textwrap
from typing import Any

from markupsafe import Markup

from zephyr_ray.formatting import number
from zephyr_ray.report.plots.figure import (
    LARGE,
    add_legend,
    draw_figure,
    legend_height,
    shorten_name,
    wrap,
)
from zephyr_ray.section import Radar


def draw_radar(block: Radar, colors: dict[str, str]) -> Markup:
    """Draws the values of all series; a polygon has a gap where a value is unknown."""
    from matplotlib.ticker import MaxNLocator

    label = f"{block.title}: " + "; ".join(
        f"{name}: {', '.join(f'{a} {number(v)}' for a, v in zip(block.axes, values, strict=True))}"
        for name, values in block.series
    )
    turn = [2 * math.pi * n / len(block.axes) for n in range(len(block.axes))]

    def paint(axes: Any) -> None:
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        for name, values in block.series:
            radii = [math.nan if value is None else value for value in values]
            style: dict[str, Any] = {
                "color": colors[name],
                "linewidth": 1.6,
                "marker": "o",
                "markersize": 3,
            }
            axes.plot([*turn, turn[0]], [*radii, radii[0]], label=name, **style)
            if None not in values:
                axes.fill(turn, radii, color=colors[name], alpha=0.08)
        axes.set_ylim(block.lowest, block.highest)
        axes.set_xticks(turn, [])
        for angle, name in zip(turn, block.axes, strict=True):
            side = math.sin(angle)
            align = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            beyond = block.lowest + 1.09 * (block.highest - block.lowest)
            words = textwrap.fill(shorten_name(name, 18), 11, break_long_words=False)
            axes.text(angle, beyond, words, ha=align, va="center")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_rlabel_position(180 / len(turn))
        axes.tick_params(axis="y", labelsize=8)
        axes.spines["polar"].set_alpha(0.3)
        axes.set_title(wrap(block.title, LARGE), pad=24)  # above the name of the first axis
        if len(block.series) > 1:
            add_legend(axes, len(block.series))

    return draw_figure(label, (LARGE, 3.4 + legend_height(len(block.series))), paint, "polar")
