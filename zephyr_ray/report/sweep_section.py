"""Builds a sweep's section of the report: the outcomes of its variants, by their settings.

Outcomes come from the sections of the stages: bars named after a variant, and the ends of a
variant's curves. So a new kind of measurement needs no change here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from zephyr_ray.formatting import number, setting_value
from zephyr_ray.section import (
    Bars,
    Block,
    Chapter,
    Column,
    Curve,
    Interval,
    Place,
    Section,
    Table,
    Text,
    Trend,
)
from zephyr_ray.stage import Variant, original_name

Variants = dict[str, Variant]
INTRO = (
    "Each variant is the recipe with these values of the swept settings; stages that do not depend "
    "on them ran once and are shared. The chapters below explain the values and their intervals."
)
BEST = "The best of several variants looks better than it is; confirm it on other prompts."
ENDS = (
    "Final values are means over the last tenth of the steps, measured on the training data; final "
    "validation values are measured with the trained model."
)


@dataclass
class Outcome:
    """One measurement of several variants."""

    title: str
    of_training: bool = False
    """Whether it is the final value of a curve."""
    line: float | None = None
    """A value to compare it with."""
    values: dict[str, float | Interval] = field(default_factory=dict)
    """Values by variant."""
    paired: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """Ends of the intervals of paired differences, by (first, second) variant."""


def sweep_section(variants: Variants, sections: dict[str, Section]) -> Section | None:
    """Returns the chapter of the sweep, and a headline on its best variant; None if no variant has
    an outcome. `sections` are those of the stages by name."""
    outcomes = _outcomes(variants, sections)
    names = [name for name in variants if any(name in outcome.values for outcome in outcomes)]
    if not names:
        return None
    settings = list(dict.fromkeys(key for name in names for key in variants[name].settings))
    table = Table(
        columns=(
            Column("Variant"),
            *map(Column, settings),
            *(Column(outcome.title, 3 if outcome.of_training else 2) for outcome in outcomes),
        ),
        rows=tuple(
            (
                name,
                *(_text(variants[name], key) for key in settings),
                *(outcome.values.get(name) for outcome in outcomes),
            )
            for name in names
        ),
        help=(ENDS,) if any(outcome.of_training for outcome in outcomes) else (),
    )
    trends = [t for key in settings for o in outcomes if (t := _trend(variants, key, o))]
    best = (Text(BEST, soft=True),) if len(names) > 1 else ()
    chapter = Chapter("Sweep", Place.OVERVIEW, (*trends, table, *best), INTRO)
    return Section((chapter,), _headline(outcomes))


def _outcomes(variants: Variants, sections: dict[str, Section]) -> list[Outcome]:
    """Returns the outcomes in the order of the stages. Variants of one stage share outcomes;
    if stages have outcomes of the same title, the stage is added to it."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    for stage, section in sections.items():
        original = original_name(stage, variants)
        for block in (block for chapter in section.chapters for block in chapter.blocks):
            for outcome, values in _measured(stage, block):
                for name, value in values.items():
                    if name in variants:
                        same = outcomes.setdefault((original, outcome.title), outcome)
                        same.values.setdefault(name, value)
    titles = Counter(title for _, title in outcomes)
    for (original, title), outcome in outcomes.items():
        if titles[title] > 1:
            outcome.title = f"{title} ({original})"
    # The results that bars compare are the purpose of a sweep, so they precede training values.
    return sorted(outcomes.values(), key=lambda outcome: outcome.of_training)


def _measured(stage: str, block: Block) -> Iterator[tuple[Outcome, dict[str, float | Interval]]]:
    """Yields the outcomes of one block, with the values of all models that it names, or of the
    stage itself."""
    if isinstance(block, Bars):
        yield Outcome(block.title, line=block.line, paired=block.paired), dict(block.bars)
    if not isinstance(block, Curve):
        return
    values = [value for _, value in block.points]
    tail = values[-max(1, len(values) // 10) :]
    yield Outcome(f"Final {block.title}", of_training=True), {stage: sum(tail) / len(tail)}
    if block.validation:
        _, end = block.validation[-1]
        yield Outcome(f"Final validation {block.title}", of_training=True), {stage: end}


def _text(variant: Variant, key: str) -> str | None:
    return setting_value(variant.settings[key]) if key in variant.settings else None


def _trend(variants: Variants, key: str, outcome: Outcome) -> Trend | None:
    """Returns an outcome over the values of one setting, one series per combination of the others;
    None if it has fewer than two values."""
    series: dict[str, list[tuple[str | float, Interval]]] = {}
    for name, value in outcome.values.items():
        variant = variants[name]
        if key not in variant.settings:
            continue
        others = [f"{k} {_text(variant, k)}" for k in variant.settings if k != key]
        at = variant.settings[key]
        is_number = isinstance(at, int | float) and not isinstance(at, bool)
        point = at if is_number else setting_value(at)
        interval = value if isinstance(value, Interval) else Interval(value, value, value)
        series.setdefault(", ".join([variant.of, *others]), []).append((point, interval))
    points = {point for line in series.values() for point, _ in line}
    if len(points) < 2:
        return None
    lines = tuple((label, tuple(line)) for label, line in series.items())
    return Trend(outcome.title, key, lines, outcome.line)


def _headline(outcomes: list[Outcome]) -> str:
    """Names the variant with the highest first outcome; empty if fewer than two variants have
    intervals."""
    first = outcomes[0]
    others = {n: v for n, v in first.values.items() if isinstance(v, Interval)}
    if len(others) < 2:
        return ""
    best = max(others, key=lambda name: others[name].value)
    top = others.pop(best)
    near = 0
    for name, value in others.items():
        low, _ = first.paired.get((best, name), (top.low - value.high, top.high - value.low))
        near += low <= 0
    text = (
        f"{best} has the highest {first.title[0].lower()}{first.title[1:]} of {len(others) + 1} "
        f"variants, {number(top.value)} [{number(top.low)}, {number(top.high)}]"
    )
    if not near:
        return f"{text}; it is clearly better than every other."
    which = "the other" if len(others) == 1 else f"{near} of the {len(others)} others"
    return f"{text}, which may be chance: it is not clearly better than {which}."
