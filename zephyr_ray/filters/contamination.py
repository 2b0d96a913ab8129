"""Finds texts that overlap with evaluation sets, that is, share a sequence of words.

The rule is GPT-3's (arXiv 2005.14165, appendix C): texts are compared ignoring case, punctuation
and whitespace; the length of a sequence is the 5th percentile of the lengths of a set's questions
in words, at least 8 and at most 13. A question of the set with fewer words matches only if it
equals a complete text of the passage, or one of the passage's questions without the constraint.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from zephyr_ray.filters.grams import normal_words
from zephyr_ray.filters.passage import Fault, Passage

SHORTEST, LONGEST = 8, 13
"""Minimum and maximum words in a sequence."""
QUANTILE = 0.05
COMMON = 10
"""Sequences in more than this many questions of a set are ignored, because they are its standard
wording; GPT-3 ignores sequences in more than 10 documents."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Base of the polynomial that hashes a sequence: any large odd number."""


class Contamination:
    """Finds passages that share a sequence of words with a question of an evaluation set."""

    def __init__(self, sets: dict[str, list[str]]):
        self._sets = {
            name: _Sequences([words for text in questions if (words := normal_words(text))])
            for name, questions in sets.items()
        }
        self.rules = tuple(map(_rule, sets))

    def __call__(self, passage: Passage) -> Fault | None:
        # The tasks are checked one by one, because a prompt with a constraint or several questions
        # never equals a question of the set.
        for text in dict.fromkeys((*passage.tasks, *passage.texts(), passage.rejected or "")):
            words = normal_words(text)
            hashes = _hash_words(words)
            for name, sequences in self._sets.items():
                if shared := sequences.shared(words, hashes):
                    fix = "remove that set from evaluation_sets or use other data"
                    return Fault(_rule(name), fix, shared)
        return None


class _Sequences:
    """The word sequences in a set's questions, as hashes of 8 bytes each."""

    def __init__(self, questions: list[list[str]]):
        lengths = sorted(map(len, questions)) or [0]
        shortest = lengths[int(QUANTILE * len(lengths))]
        self._n = min(max(shortest, SHORTEST), LONGEST)
        hashes = [np.unique(_hash_sequences(_hash_words(q), self._n)) for q in questions]
        unique, counts = np.unique(np.concatenate([_EMPTY, *hashes]), return_counts=True)
        self._sorted = unique[counts <= COMMON]
        self._short = {" ".join(words) for words in questions if len(words) < self._n}

    def shared(self, words: list[str], hashes: np.ndarray) -> str:
        """Returns the first sequence that a text shares with the set, or "" if it shares none."""
        if len(words) < self._n:
            text = " ".join(words)
            return text if text in self._short else ""
        if not len(self._sorted):
            return ""
        sequences = _hash_sequences(hashes, self._n)
        at = np.searchsorted(self._sorted, sequences).clip(max=len(self._sorted) - 1)
        [matches] = np.nonzero(self._sorted[at] == sequences)
        return " ".join(words[matches[0] : matches[0] + self._n]) if len(matches) else ""


_EMPTY = np.zeros(0, np.uint64)


def _hash_words(words: Sequence[str]) -> np.ndarray:
    return np.array([_hash_word(word) for word in words], np.uint64)


@lru_cache(2**16)
def _hash_word(word: str) -> int:
    """Returns a hash that, unlike Python's, is the same in every process."""
    digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _hash_sequences(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hash of each sequence of n words: a polynomial in their hashes, modulo 2^64."""
    count = len(hashes) - n + 1
    if count < 1:
        return _EMPTY
    result = np.zeros(count, np.uint64)
    for offset in range(n):
        result = result * BASE + hashes[offset : offset + count]
    return result


def _rule(name: str) -> str:
    return f"in evaluation set {name}"
