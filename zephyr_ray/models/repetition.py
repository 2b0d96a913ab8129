"""Detects text that a model repeats over and over."""

import re
from collections import Counter

from zephyr_ray.models.constraint_kinds import words

LOOP_WORDS, LOOP_TIMES, LOOP_UNITS = 6, 3, 12
"""Words per run; occurrences of a line or of a run (overlaps count); occurrences of a unit of 1-4
letters without a gap. Two occurrences are no loop: an answer may repeat the request first."""

_ITEM_MARK = re.compile(r"^\s*(?:[*-]|\d+[.)])\s+")
_UNIT_LOOP = re.compile(rf"([^\W\d_]{{1,4}}?)\1{{{LOOP_UNITS - 1},}}")


def loops(text: str) -> bool:
    """Returns whether a line, a run of words or a unit of letters repeats as LOOP_* say."""
    lines = Counter(_ITEM_MARK.sub("", line).strip().casefold() for line in text.splitlines())
    spoken = words(text)
    runs = Counter(
        tuple(spoken[at : at + LOOP_WORDS]) for at in range(len(spoken) - LOOP_WORDS + 1)
    )
    return (
        any(times >= LOOP_TIMES for line, times in lines.items() if words(line))
        or any(times >= LOOP_TIMES for times in runs.values())
        or _UNIT_LOOP.search(text) is not None
    )
