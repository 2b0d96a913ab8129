"""Finds rows that repeat an earlier one: exactly, or nearly by MinHash and locality-sensitive
hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3)."""

import hashlib

from rensa import RMinHash, RMinHashDeduplicator

from zephyr_ray.filters.grams import grams, normal_words

HASHES, SEED = 128, 0
"""Hashes per sketch, so that an estimate has a standard deviation of at most 0.045; their seed."""
BANDS = 32
"""Number of bands, of four values each. Two texts with similarity 0.5 share a band with probability
0.87; with 0.7, nearly always. The library's default for a threshold of 0.8 is 8 bands, which miss
half of the pairs with similarity 0.85."""
SHINGLE = 3
"""Words per shingle; few, because prompts are short."""


def sketch(text: str) -> RMinHash:
    """Returns the MinHash sketch of a text's shingles; a shorter text is one shingle."""
    words = normal_words(text)
    minhash = RMinHash(HASHES, SEED)
    minhash.update(list(grams(words, min(SHINGLE, max(1, len(words))))))
    return minhash


class ExactDuplicates:
    """Digests of the texts that were added."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def add(self, text: str) -> bool:
        """Adds a text; returns whether it is new."""
        digest = _digest(text)
        is_new = digest not in self._seen
        self._seen.add(digest)
        return is_new


class NearDuplicates:
    """Sketches of texts that are not near duplicates of each other, by number."""

    def __init__(self, similarity: float):
        """Texts whose shingles have an estimated Jaccard similarity of at least `similarity` are
        near duplicates."""
        self._index = RMinHashDeduplicator(
            similarity, HASHES, use_lsh=True, num_bands=BANDS, seed=SEED
        )

    def add(self, number: int, minhash: RMinHash, group: str = "") -> int | None:
        """Adds a text and returns None; if it is a near duplicate, returns the number of the first
        text that it duplicates. Texts of one group are not duplicates of each other."""
        own = _digest(group).hex() if group else ""
        near = (key.partition(" ") for key in self._index.get_duplicates(minhash))
        others = [int(earlier) for earlier, _, its in near if not own or its != own]
        if others:
            return min(others)  # the index has no order
        # The index ignores a text that resembles one of its group; the earlier one represents both.
        self._index.add(f"{number} {own}", minhash)
        return None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
