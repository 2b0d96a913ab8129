"""Draws curves over steps, and trends over the values of a setting."""

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from zephyr_ray.formatting import number, setting_value, significant
from zephyr_ray.report.plots.figure import INK, SMALL, add_legend, draw_figure, legend_height, wrap
from zephyr_ray.section import Curve, Curves, Interval, Trend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curve(block: Curve, stage: str, color: str) -> Markup:
    """Draws one value over the steps of a stage, and the same value on held-out data."""
    steps, values = zip(*block.points, strict=True)
    ends = f"from {significant(values[0])} to {significant(values[-1])}"
    label = f"{stage} · {block.title} over {len(steps)} steps: {ends}"
    if block.validation:
        at, held_out = zip(*block.validation, strict=True)
        first, last = significant(held_out[0]), significant(held_out[-1])
        label += f"; validation from {first} to {last}"

    def paint(axes: "Axes") -> None:
        marker = "o" if len(steps) < 3 else None
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, label="training")
        if block.validation:
            axes.plot(at, held_out, color=INK, linewidth=1.4, marker="o", markersize=4)
            axes.lines[-1].set_label("validation")
            add_legend(axes, 2)
        _label_steps(axes, block.title)

    height = 2.2 + (legend_height(2) if block.validation else 0)
    return draw_figure(label, (SMALL, height), paint)


def draw_curves(block: Curves, colors: dict[str, str]) -> Markup:
    """Draws one value over the steps of several runs."""
    ends = (
        f"{name} from {significant(points[0][1])} to {significant(points[-1][1])}"
        for name, points in block.series
    )

    def paint(axes: "Axes") -> None:
        for name, points in block.series:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colors[name], linewidth=1.4, label=name)
        _label_steps(axes, block.title)
        add_legend(axes, len(block.series))

    label = f"{block.title}: {'; '.join(ends)}"
    return draw_figure(label, (SMALL, 2.2 + legend_height(len(block.series))), paint)


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
            add_legend(axes, len(block.series))
        axes.set_xticks(list(places.values()), ticks)
        axes.minorticks_off()
        axes.margins(x=0.08)
        axes.grid(axis="y")
        axes.set_xlabel(block.setting)
        axes.set_title(wrap(block.title, SMALL))

    return draw_figure(label, (SMALL, 2.3 + legend_height(len(block.series))), paint)


def _label_steps(axes: "Axes", title: str) -> None:
    """Adds the title, and the horizontal axis of training steps."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(axis="y")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_title(wrap(title, SMALL))


def _with_interval(value: Interval) -> str:
    if value.low == value.high:
        return significant(value.value)
    return f"{number(value.value)} from {number(value.low)} to {number(value.high)}"
