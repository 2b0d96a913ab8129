"""Measures ROUGE-L between short texts, and the diversity of a set of texts."""

import math
from collections import Counter

import numpy as np
import regex
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist, extractOne

from zephyr_ray.models.spacing import WORD, spaced

_ROUGE_L = Indel.normalized_similarity
COMPARED, COMPARED_WORDS = 1000, 200
"""Maximum texts, and words per text, that `diversity` compares with each other."""
_WORD = regex.compile(rf"{WORD}(?:'{WORD})?", regex.V1)


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation; the characters of a text
    without words, such as emoji."""
    return _WORD.findall(spaced(text).replace("’", "'").lower()) or list("".join(text.split()))


class SimilarityIndex:
    """Measures how similar a text is to the most similar of many texts. ROUGE-L F = 2·LCS/(m+n)
    is the normalized Indel similarity."""

    def __init__(self, texts: list[str]):
        self._words = [split_words(text) for text in texts]

    def nearest(self, text: str, cutoff: float = 0.0) -> float:
        """Returns ROUGE-L F (0 to 1) to the most similar text; 0 if no text reaches `cutoff`."""
        match = extractOne(
            split_words(text),
            self._words,
            scorer=_ROUGE_L,
            processor=None,
            score_cutoff=cutoff,
        )
        return float(match[1]) if match else 0.0

    def add(self, text: str) -> None:
        self._words.append(split_words(text))


def diversity(texts: list[str]) -> dict[str, float]:
    """Returns the shares of distinct 1- and 2-grams, the mean and maximum ROUGE-L to the nearest
    other text, and the number and entropy (in bits) of first words, mostly verbs in instructions.
    """
    if not texts:
        return {}
    tokens = [split_words(text) for text in texts]
    figures = {}
    for n in (1, 2):
        grams = [tuple(t[i : i + n]) for t in tokens for i in range(len(t) - n + 1)]
        figures[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    nearest = _nearest_others(tokens)
    figures["nearest_mean"] = sum(nearest) / len(nearest)
    figures["nearest_max"] = max(nearest)
    first = Counter(t[0] for t in tokens if t)
    total = sum(first.values())
    figures["openings"] = float(len(first))
    figures["openings_bits"] = sum(c / total * math.log2(total / c) for c in first.values())
    return figures


def _nearest_others(tokens: list[list[str]]) -> list[float]:
    """Returns the ROUGE-L of each text to its nearest neighbor, among at most `COMPARED` evenly
    spaced texts and within their first `COMPARED_WORDS` words, because the time is quadratic."""
    if len(tokens) < 2:
        return [0.0]
    # One character per word: strings are compared several times as fast as lists.
    characters: dict[str, str] = {}
    texts = [
        "".join(characters.setdefault(word, chr(len(characters))) for word in t[:COMPARED_WORDS])
        for t in tokens[:: math.ceil(len(tokens) / COMPARED)]
    ]
    scores = cdist(texts, texts, scorer=_ROUGE_L, dtype=np.float64)
    np.fill_diagonal(scores, -1)
    return [float(score) for score in scores.max(axis=1)]
