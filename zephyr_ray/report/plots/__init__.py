"""Draws the report's plots: small inline SVG, one idea each, narrow enough for a phone."""

from collections.abc import Sequence

from markupsafe import Markup

from zephyr_ray.report.plots.bars import draw_interval_bars
from zephyr_ray.report.plots.histograms import Bins, draw_histogram
from zephyr_ray.report.plots.lines import draw_curve, draw_curves, draw_trend
from zephyr_ray.report.plots.radar import draw_radar
from zephyr_ray.report.plots.scatter import draw_scatter
from zephyr_ray.section import Bars, Block, Curve, Curves, Histogram, Radar, Scatter, Trend


def draw(plots: Sequence[Block], stage: str, colors: dict[str, str]) -> list[Markup]:
    """Draws consecutive plots from one stage; returns an empty list if the blocks are
    not plots. `colors` gives each model or stage its color."""
    drawn = []
    histograms = [block for block in plots if isinstance(block, Histogram)]
    bins = Bins.of(histograms)
    top_count = max((max(bins.count(block.scores)) for block in histograms), default=0)
    for block in plots:
        match block:
            case Bars():
                drawn.append(draw_interval_bars(block, colors))
            case Curve():
                drawn.append(draw_curve(block, stage, colors[stage]))
            case Curves():
                drawn.append(draw_curves(block, colors))
            case Trend():
                drawn.append(draw_trend(block, colors))
            case Histogram():
                drawn.append(draw_histogram(block, bins, top_count, colors[block.title]))
            case Scatter():
                drawn.append(draw_scatter(block, colors))
            case Radar():
                drawn.append(draw_radar(block, colors))
    return drawn
