"""Normalizes texts to words, and yields their n-grams."""

import unicodedata
from collections.abc import Iterator

from zephyr_ray.messages import visible
from zephyr_ray.models.similarity import split_words


def normal_words(text: str) -> list[str]:
    """Returns the words of a text, casefolded, without punctuation and invisible characters, and
    in NFKC form, which unifies variants of a character such as full-width letters."""
    # The splitter treats an underscore as a letter.
    return split_words(unicodedata.normalize("NFKC", visible(text)).casefold().replace("_", " "))


def grams(words: list[str], n: int) -> Iterator[str]:
    """Yields the sequences of n consecutive words."""
    return (" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
