"""ROUGE-L between short texts, and how varied a set of them is."""

import math
import re
from collections import Counter

from rapidfuzz.distance import Indel
from rapidfuzz.process import extract, extractOne

_ROUGE_L = Indel.normalized_similarity


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)?", text.lower())


class Kept:
    """Texts kept so far. ROUGE-L F = 2·LCS/(m+n), which is the normalised Indel similarity."""

    def __init__(self, texts: list[str]):
        self._words = [words(text) for text in texts]

    def nearest(self, text: str, cutoff: float = 0.0) -> float:
        """ROUGE-L F (0 to 1) to the most similar text kept; 0 when none reaches `cutoff`."""
        found = extractOne(
            words(text),
            self._words,
            scorer=_ROUGE_L,
            processor=None,
            score_cutoff=cutoff,
        )
        return float(found[1]) if found else 0.0

    def add(self, text: str) -> None:
        self._words.append(words(text))


def diversity(texts: list[str]) -> dict[str, float]:
    """Distinct 1- and 2-grams (share), ROUGE-L to the nearest other text (mean and maximum), and
    the spread of opening words, which in instructions are mostly verbs (count, entropy in bits)."""
    if not texts:
        return {}
    tokens = [words(text) for text in texts]
    figures = {}
    for n in (1, 2):
        grams = [tuple(t[i : i + n]) for t in tokens for i in range(len(t) - n + 1)]
        figures[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    # Of the two nearest texts one is the text itself.
    scores = [
        [found[1] for found in extract(t, tokens, scorer=_ROUGE_L, processor=None, limit=2)]
        for t in tokens
    ]
    nearest = [found[1] for found in scores if len(found) == 2] or [0.0]
    figures["nearest_mean"] = sum(nearest) / len(nearest)
    figures["nearest_max"] = max(nearest)
    first = Counter(t[0] for t in tokens if t)
    total = sum(first.values())
    figures["openings"] = float(len(first))
    figures["openings_bits"] = sum(c / total * math.log2(total / c) for c in first.values())
    return {name: round(value, 4) for name, value in figures.items()}
