"""Draws the report's plots: small inline SVG, one idea each, narrow enough for a phone.

Text stays text, so that it takes the page's font and can be searched. Ink is `currentColor`, so
that the page's light and dark schemes apply; each series has one color that is legible on both.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from zephyr_ray.formatting import duration, number, setting_value
from zephyr_ray.section import Bars, Block, Curve, Histogram, Interval, Trend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#4477aa", "#ee6677", "#228833", "#b8860b", "#3a9fbf", "#aa3377", "#808080")
"""Paul Tol's bright scheme, distinct to color-blind readers, with its yellow and cyan darkened."""
INK = "#010203"
"""Placeholder that becomes `currentColor`."""
WIDTH = 4.6
"""Width of a figure in inches."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zephyr_ray",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


def draw(plots: Sequence[Block], stage: str, colors: dict[str, str]) -> list[Markup]:
    """Draws consecutive plots of one type from one stage; returns an empty list if the blocks are
    not plots."""
    drawn = []
    top_count = max(
        (n for p in plots if isinstance(p, Histogram) for n in count_scores(p)), default=0
    )
    for block in plots:
        match block:
            case Bars():
                drawn.append(draw_interval_bars(block, colors))
            case Curve():
                drawn.append(draw_curve(block, stage, colors[stage]))
            case Trend():
                drawn.append(draw_trend(block, colors))
            case Histogram():
                drawn.append(draw_histogram(block, top_count, colors[block.title]))
    return drawn


def draw_figure(label: str, height: float, paint: Callable[["Axes"], None]) -> Markup:
    """Paints a figure of WIDTH by `height` inches; `label` describes it to screen readers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue(), label)


def _inline(svg: str, label: str) -> Markup:
    """Removes prologue, metadata, fixed size and unused ids; adds the label."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box
    return Markup(
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
        f'aria-label="{escape(label)}">{rest}'
    )


def draw_interval_bars(block: Bars, colors: dict[str, str]) -> Markup:
    """Draws horizontal bars on a 0–1 axis with their intervals, and a dashed reference line."""
    label = f"{block.title}: " + "; ".join(
        f"{name} {number(bar.value)} from {number(bar.low)} to {number(bar.high)}"
        for name, bar in block.bars
    )

    def paint(axes: "Axes") -> None:
        for position, (name, bar) in enumerate(block.bars):
            axes.barh(position, bar.value, color=colors[name], height=0.62)
            axes.plot(
                [bar.low, bar.high], [position, position], color=INK, linewidth=1.6, marker="|"
            )
            axes.text(1.02, position, number(bar.value), va="center")
        if block.line is not None:
            axes.axvline(block.line, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_yticks(range(len(block.bars)), [_short(name) for name, _ in block.bars])
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.set_title(block.title)

    return draw_figure(label, 0.75 + 0.34 * len(block.bars), paint)


def draw_curve(block: Curve, stage: str, color: str) -> Markup:
    """Draws one value over the steps of a stage, and the same value on held-out data."""
    from matplotlib.ticker import MaxNLocator

    steps, values = zip(*block.points, strict=True)
    ends = f"from {values[0]:.3g} to {values[-1]:.3g}"
    label = f"{stage} · {block.title} over {len(steps)} steps: {ends}"
    if block.validation:
        at, held_out = zip(*block.validation, strict=True)
        label += f"; validation from {held_out[0]:.3g} to {held_out[-1]:.3g}"

    def paint(axes: "Axes") -> None:
        marker = "o" if len(steps) < 3 else None
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, label="training")
        if block.validation:
            axes.plot(at, held_out, color=INK, linewidth=1.4, marker="o", markersize=4)
            axes.lines[-1].set_label("validation")
            axes.legend()
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_title(block.title)

    return draw_figure(label, 2.3, paint)


def draw_trend(block: Trend, colors: dict[str, str]) -> Markup:
    """Draws values with their intervals over a setting: on a logarithmic axis if its numbers span a
    decade, as categories if one of its values is not a number."""
    from matplotlib.transforms import ScaledTranslation

    settings = list(dict.fromkeys(at for _, points in block.series for at, _ in points))
    numbers = [at for at in settings if not isinstance(at, str)]
    is_numeric = len(numbers) == len(settings)
    places = {at: at if is_numeric else index for index, at in enumerate(settings)}
    ticks = [setting_value(at) for at in settings]
    label = f"{block.title} by {block.setting}: " + "; ".join(
        f"{name} at {setting_value(at)}: {_with_interval(value)}"
        for name, points in block.series
        for at, value in points
    )

    def paint(axes: "Axes") -> None:
        if is_numeric and min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
            axes.set_xscale("log")
        for index, (name, points) in enumerate(block.series):
            style: dict[str, Any] = {"color": colors[name], "linewidth": 1.6}
            at, values = zip(*sorted((places[at], value) for at, value in points), strict=True)
            [line] = axes.plot(at, [v.value for v in values], marker="o", label=name, **style)
            ends = axes.vlines(at, [v.low for v in values], [v.high for v in values], **style)
            # Side by side, because intervals of several series at one value would hide each other.
            shift = (index - (len(block.series) - 1) / 2) * 5 / 72
            beside = axes.transData + ScaledTranslation(shift, 0, axes.figure.dpi_scale_trans)
            for artist in (line, ends):
                artist.set_transform(beside)
        if block.line is not None:
            axes.axhline(block.line, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        if len(block.series) > 1:
            axes.figure.legend(loc="outside lower center", fontsize=8)
        axes.set_xticks(list(places.values()), ticks)
        axes.minorticks_off()
        axes.margins(x=0.08)
        axes.grid(axis="y")
        axes.set_xlabel(block.setting)
        axes.set_title(block.title)

    return draw_figure(label, 2.4 + 0.18 * len(block.series), paint)


def _with_interval(value: Interval) -> str:
    if value.low == value.high:
        return f"{value.value:.3g}"
    return f"{number(value.value)} from {number(value.low)} to {number(value.high)}"


def draw_histogram(block: Histogram, top_count: int, color: str) -> Markup:
    """Draws how often each score was given; `top_count` is the highest count among neighboring
    histograms, which share a scale."""
    times = count_scores(block)
    mean = number(sum(block.scores) / len(block.scores), 1)
    given = ", ".join(f"{n} was given {c} times" for n, c in enumerate(times, 1))
    label = f"{block.title}: {given}"

    def paint(axes: "Axes") -> None:
        axes.bar(range(1, 11), times, color=color, width=0.8)
        axes.set_xticks(range(1, 11))
        axes.set_ylim(0, top_count * 1.08)
        axes.grid(axis="y")
        axes.set_title(f"{_short(block.title)} · mean {mean}, {len(block.scores)} answers")

    return draw_figure(label, 1.9, paint)


def count_scores(block: Histogram) -> list[int]:
    """Counts the scores per whole number from 1 to 10; halves round up."""
    return [sum(int(score + 0.5) == whole for score in block.scores) for whole in range(1, 11)]


def draw_time_bars(seconds: dict[str, float]) -> Markup:
    """Draws the wall time of each stage."""
    texts = {name: duration(value) for name, value in seconds.items()}
    label = "Wall time: " + "; ".join(f"{name} {text}" for name, text in texts.items())

    def paint(axes: "Axes") -> None:
        longest = max(seconds.values()) or 1
        for position, (name, text) in enumerate(texts.items()):
            axes.barh(position, seconds[name], color=COLORS[0], height=0.66)
            axes.text(seconds[name] + longest * 0.015, position, text, va="center", fontsize=9)
        axes.set_yticks(range(len(texts)), [_short(name) for name in texts])
        axes.set_xlim(0, longest * 1.28)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.invert_yaxis()

    return draw_figure(label, 0.5 + 0.27 * len(texts), paint)


def _short(name: str, limit: int = 24) -> str:
    """Returns the start and the end of a long name: the end distinguishes the variants of a
    sweep."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 3]}…{name[limit // 3 + 1 - limit :]}"
