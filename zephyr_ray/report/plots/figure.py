"""Draws one figure as inline SVG: its size, style and colors.

Text stays text, so that it takes the page's font and can be searched. Ink is `currentColor`, so
that the page's light and dark schemes apply; each series has one color that is legible on both.
"""

import io
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#4477aa", "#ee6677", "#228833", "#b8860b", "#3a9fbf", "#aa3377", "#808080")
"""Paul Tol's bright scheme, distinct to color-blind readers, with its yellow and cyan darkened."""
INK = "#010203"
"""Placeholder that becomes `currentColor`."""
SMALL, LARGE = 3.7, 4.6
"""Widths of a figure in inches: three small or two large ones fit side by side on a screen."""
LEGEND_ROW = 0.2
"""Height of a row of a legend in inches."""
NEEDLESS = (
    r"<metadata>.*?</metadata>",
    r"<style.*?</style>",
    r"font-family: [^;]+; ",
    r' transform="rotate\(-0 [^"]*"',
    r'<path d="[^"]*" style="fill: none"/>',
    r"\n *(?=<)",
)
"""Parts of a figure that the page does not need."""
LETTERS = 11.5
"""Characters of a title per inch."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zephyr_ray",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


def draw_figure(
    label: str,
    size: tuple[float, float],
    paint: Callable[["Axes"], None],
    projection: str | None = None,
) -> Markup:
    """Paints a figure of a width and height in inches; `label` describes it to screen readers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots(subplot_kw={"projection": projection}))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue(), label)


def add_legend(axes: "Axes", names: int) -> None:
    """Adds a legend below the axes, where it covers nothing. `names` is its number of entries."""
    axes.figure.legend(loc="outside lower center", ncols=1 if names > 2 else 2)


def legend_height(names: int) -> float:
    """Returns the inches that a legend needs."""
    return 0.1 + LEGEND_ROW * (names if names > 2 else 1)


def wrap(text: str, width: float) -> str:
    """Breaks a title into lines that fit a figure of this width."""
    return textwrap.fill(text, int(width * LETTERS))


def shorten_name(name: str, limit: int = 24) -> str:
    """Returns the start and the end of a long name: the end distinguishes the variants of a
    sweep."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 3]}…{name[limit // 3 + 1 - limit :]}"


def _inline(svg: str, label: str) -> Markup:
    """Removes the prologue, the fixed size, the styles that the page sets and everything invisible,
    which is most of the file; adds the label."""
    head, rest = svg[svg.index("<svg") :].replace(INK, "currentColor").split(">", 1)
    for needless in NEEDLESS:
        rest = re.sub(needless, "", rest, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", rest))
    rest = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", rest)
    rest = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', lambda m: _shorten(m[0]), rest)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box
    return Markup(
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
        f'aria-label="{escape(label)}">{rest}'
    )


def _shorten(coordinates: str) -> str:
    """Rounds coordinates to a tenth of a point, which looks the same, and joins their lines."""
    rounded = re.sub(r"\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), coordinates)
    return rounded.replace("\n", " ")
