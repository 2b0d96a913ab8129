"""Whether a text repeats itself."""

import re
from collections import Counter

from zephyr_ray.models.constraint_checks import words

# A loop: the same line, or the same run of six words (overlaps count), three times; or a unit of
# 1-4 letters written twelve times with nothing between. One repeat can be honest: a request may be
# repeated before it is answered.
LOOP_WORDS, LOOP_TIMES, LOOP_UNITS = 6, 3, 12

_ITEM_MARK = re.compile(r"^\s*(?:[*-]|\d+[.)])\s+")
_UNIT_LOOP = re.compile(rf"([^\W\d_]{{1,4}}?)\1{{{LOOP_UNITS - 1},}}")


def loops(text: str) -> bool:
    """Whether the text is caught in a repetition loop; thresholds are LOOP_* above."""
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
