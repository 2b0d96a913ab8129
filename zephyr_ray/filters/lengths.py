"""Finds answers, or prompts without an answer, that are too short or too long."""

from zephyr_ray.filters.passage import Fault, Passage
from zephyr_ray.models.spacing import spaced

TOO_SHORT, TOO_LONG = "shorter than min_words", "longer than max_words"


def find_length(passage: Passage, *, min_words: int | None, max_words: int | None) -> Fault | None:
    """Finds a text with too few or too many words. In scripts without spaces, each letter counts as
    a word."""
    text = "\n".join(passage.tasks) if passage.answer is None else passage.answer
    words = len(spaced(text).split())
    if min_words is not None and words < min_words:
        return Fault(TOO_SHORT, "lower min_words", f"{words} words")
    if max_words is not None and words > max_words:
        return Fault(TOO_LONG, "raise max_words", f"{words} words")
    return None
