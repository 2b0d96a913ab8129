"""Normalizes texts to words, and yields their n-grams."""

import unicodedata
from collections.abc import Iterator

from zephyr_ray.messages import visible
from zephyr_ray.models.similarity import split_words


def normal_words(text: str) -> list[str]:
    """Returns the words of a text in one form: without case, punctuation, invisible characters and
    differences of Unicode compatibility, such as full-width letters."""
    # For the splitter, an underscore is a letter.
    return split_words(unicodedata.normalize("NFKC", visible(text)).casefold().replace("_", " "))


def grams(words: list[str], n: int) -> Iterator[str]:
    """Yields the sequences of n consecutive words."""
    return (" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
