"""Detects text that a model repeats over and over."""

import re
from collections import Counter
from collections.abc import Iterator

from zephyr_ray.models.constraint_kinds import words
from zephyr_ray.models.spacing import is_unspaced

LOOP_WORDS, LOOP_TIMES, LOOP_UNITS = 6, 3, 12
"""Words per run; minimum occurrences of a line or run in a loop (overlaps count); minimum
consecutive occurrences of a unit of 1-4 letters in a loop. Two occurrences are not a loop, because
an answer may repeat the request first."""
WORD_LETTERS = 2
"""Letters that count as one word, in scripts without spaces between words."""

_ITEM_MARK = re.compile(r"^\s*(?:[*-]|\d+[.)])\s+")
_UNIT_LOOP = re.compile(rf"([^\W\d_]{{1,4}}?)\1{{{LOOP_UNITS - 1},}}")


def loops(text: str) -> bool:
    """Returns whether a line, a run of words or a unit of letters reaches its LOOP_* limit."""
    lines = Counter(_ITEM_MARK.sub("", line).strip().casefold() for line in text.splitlines())
    return (
        any(times >= LOOP_TIMES for line, times in lines.items() if words(line))
        or any(times >= LOOP_TIMES for times in Counter(_runs(words(text))).values())
        or _UNIT_LOOP.search(text) is not None
    )


def _runs(text_words: list[str]) -> Iterator[tuple[str, ...]]:
    """Yields every shortest run that counts as LOOP_WORDS words."""
    sizes = [1 if is_unspaced(word) else WORD_LETTERS for word in text_words]
    start = size = 0
    for end, added in enumerate(sizes):
        size += added
        while size - sizes[start] >= LOOP_WORDS * WORD_LETTERS:
            size -= sizes[start]
            start += 1
        if size >= LOOP_WORDS * WORD_LETTERS:
            yield tuple(text_words[start : end + 1])
