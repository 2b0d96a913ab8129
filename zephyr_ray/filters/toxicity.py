"""Finds texts that contain a word or phrase of a list."""

from pathlib import Path

from zephyr_ray.errors import Permanent
from zephyr_ray.filters.grams import grams, normal_words
from zephyr_ray.filters.passage import Fault, Passage

TOXIC = "toxic word"
MAX_BYTES, MAX_WORDS = 1_000_000, 10
"""Maximum bytes of a list, and words of a phrase."""


class ToxicWords:
    """Finds passages with a listed word or phrase, in whole words; ignores the rejected answer."""

    def __init__(self, phrases: list[list[str]]):
        self._phrases = {" ".join(words) for words in phrases}
        self._lengths = sorted({len(words) for words in phrases})

    def __call__(self, passage: Passage) -> Fault | None:
        for text in passage.texts():
            words = _words(text)
            for length in self._lengths:
                for phrase in grams(words, length):
                    if phrase in self._phrases:
                        fix = "remove words from the file of toxic_words"
                        return Fault(TOXIC, fix, f"“{phrase}”")
        return None


def read_phrases(path: Path) -> list[list[str]]:
    """Returns the phrases in a file, each as its words. The file has one phrase per line; a line
    that begins with # is a comment. Raises Permanent if the file is not such a list."""
    if path.is_dir() or path.stat().st_size > MAX_BYTES:
        raise Permanent(
            f"{path} is a folder or has more than {MAX_BYTES} bytes; name a list with one word or "
            "phrase per line"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Permanent(f"{path} is not UTF-8; convert it to UTF-8") from None
    phrases = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = _words(line)
        if not 0 < len(words) <= MAX_WORDS:
            raise Permanent(
                f"{path} line {number}: {len(words)} words; write 1 to {MAX_WORDS} words per line"
            )
        phrases.append(words)
    if not phrases:
        raise Permanent(f"{path} has no words; write one word or phrase per line")
    return phrases


def _words(text: str) -> list[str]:
    """Returns the words of a text, without the 's of a possessive."""
    return [word.removesuffix("'s") for word in normal_words(text)]
