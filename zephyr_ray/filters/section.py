"""Builds the report's section on a cleaned artifact: what each rule removed."""

from typing import Any

from zephyr_ray.filters.language import UNKNOWN
from zephyr_ray.filters.passage import DROPPED
from zephyr_ray.manifest import Manifest
from zephyr_ray.section import (
    Answer,
    Chapter,
    Column,
    Place,
    Sample,
    Section,
    Table,
)

INTRO = (
    "What each rule removed or changed, with up to three examples. A dialogue ends before its "
    "first exchange that breaks a rule; an exchange that breaks several counts under the first."
)
KEPT = ("true-cased", UNKNOWN)
"""Counts of kept texts: those true-cased, and those whose language was not detected."""


def cleaning_section(manifest: Manifest) -> Section | None:
    """Returns the counts of rules, and examples before and after; None if no rule applied."""
    rules = {
        name.removeprefix(DROPPED): count
        for name, count in manifest.counts.items()
        if name.startswith(DROPPED) or name in KEPT
    }
    if not rules:
        return None
    ordered = sorted(rules.items(), key=lambda item: -item[1])
    table = Table(
        (Column("rule"), Column("count", digits=0)), tuple((n, int(c)) for n, c in ordered)
    )
    examples = manifest.examples
    samples = [
        _sample(rule, example)
        for rule, _ in ordered
        for example in examples.get(f"{DROPPED}{rule}", examples.get(rule, []))
    ]
    return Section((Chapter("Cleaning", Place.PROCESS, (table, *samples), INTRO),))


def _sample(rule: str, example: Any) -> Sample:
    """Returns an example as its text before and after cleaning. Examples of earlier versions lack
    fields."""
    before, after = str(example), "(nothing)"
    why: tuple[str, ...] = ()
    if isinstance(example, list):
        before, after = map(str, example)
    elif isinstance(example, dict):
        before = "\n\n".join(str(example[k]) for k in ("prompt", "answer") if k in example)
        after = f"({example.get('left', 'nothing')})"
        why = (f"why: {example['why']}",) if "why" in example else ()
    return Sample(rule, (Answer("before", before), Answer("after", after, reasons=why)))
