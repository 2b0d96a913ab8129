"""The report's plots: small inline SVG, one idea each, narrow enough for a phone.

Text stays text, so that it takes the page's font and can be searched. Ink is `currentColor`, so
that the page's light and dark schemes apply; series have one colour that is legible on both.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#4477aa", "#ee6677", "#228833", "#b8860b", "#3a9fbf", "#aa3377", "#808080")
"""Paul Tol's bright scheme, told apart by the colour-blind; its yellow and cyan darkened."""
INK = "#010203"
WIDTH = 4.6
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

Interval = tuple[str, float, float, float]
"""Label, value, low, high."""


class Plot:
    """One figure on its way to SVG; `axes` is drawn on inside `plot`."""

    def __init__(self, axes: "Axes"):
        self.axes = axes
        self.svg = Markup("")


@contextmanager
def plot(label: str, height: float) -> Iterator[Plot]:
    """A figure of WIDTH by `height` inches, described by `label` for who cannot see it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        drawn = Plot(figure.subplots())
        yield drawn
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    drawn.svg = _inline(file.getvalue(), label)


def _inline(svg: str, label: str) -> Markup:
    """Without prologue, metadata, fixed size and the ids nothing refers to."""
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


def interval_bars(
    title: str, items: Sequence[Interval], colours: dict[str, str], line: float | None = None
) -> Markup:
    """Horizontal bars on 0..1 with their intervals, and a dashed line to compare with."""
    label = f"{title}: " + "; ".join(
        f"{n} {v:.2f} from {lo:.2f} to {hi:.2f}" for n, v, lo, hi in items
    )
    with plot(label, 0.75 + 0.34 * len(items)) as drawn:
        axes = drawn.axes
        for place, (name, value, low, high) in enumerate(items):
            axes.barh(place, value, color=colours[name], height=0.62)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.6, marker="|")
            axes.text(1.02, place, f"{value:.2f}", va="center")
        if line is not None:
            axes.axvline(line, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_yticks(range(len(items)), [_short(name) for name, *_ in items])
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.set_title(title)
    return drawn.svg


def curve(title: str, points: Sequence[tuple[float, float]], colour: str) -> Markup:
    """One training figure over the steps."""
    from matplotlib.ticker import MaxNLocator

    steps, values = zip(*points, strict=True)
    label = f"{title} over {len(steps)} steps: from {values[0]:.3g} to {values[-1]:.3g}"
    with plot(label, 2.3) as drawn:
        drawn.axes.plot(
            steps, values, color=colour, linewidth=1.6, marker="o" if len(steps) < 3 else None
        )
        drawn.axes.grid(axis="y")
        drawn.axes.margins(x=0.02)
        drawn.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn.axes.set_xlabel("step")
        drawn.axes.set_title(title)
    return drawn.svg


def histogram(title: str, scores: Sequence[float], top: int, colour: str) -> Markup:
    """How often each score from 1 to 10 was given; `top` makes neighbours comparable."""
    counts = [sum(round(s) == n for s in scores) for n in range(1, 11)]
    mean = sum(scores) / len(scores)
    label = f"{title}: " + ", ".join(f"{n} was given {c} times" for n, c in enumerate(counts, 1))
    with plot(label, 1.9) as drawn:
        drawn.axes.bar(range(1, 11), counts, color=colour, width=0.8)
        drawn.axes.set_xticks(range(1, 11))
        drawn.axes.set_ylim(0, top * 1.08)
        drawn.axes.grid(axis="y")
        drawn.axes.set_title(f"{_short(title)} · mean {mean:.1f}, {len(scores)} answers")
    return drawn.svg


def time_bars(items: Sequence[tuple[str, float, str]], colour: str) -> Markup:
    """Wall time a stage: (name, seconds, text)."""
    label = "Wall time: " + "; ".join(f"{name} {text}" for name, _, text in items)
    with plot(label, 0.5 + 0.27 * len(items)) as drawn:
        axes = drawn.axes
        longest = max(seconds for _, seconds, _ in items) or 1
        for place, (_, seconds, text) in enumerate(items):
            axes.barh(place, seconds, color=colour, height=0.66)
            axes.text(seconds + longest * 0.015, place, text, va="center", fontsize=9)
        axes.set_yticks(range(len(items)), [_short(name) for name, *_ in items])
        axes.set_xlim(0, longest * 1.28)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.invert_yaxis()
    return drawn.svg


def _short(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
