"""Finds rows that repeat an earlier one: exactly, or nearly by MinHash and locality-sensitive
hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3)."""

import hashlib

from rensa import RMinHash, RMinHashDeduplicator

from zephyr_ray.filters.grams import grams, normal_words

HASHES, SEED = 128, 0
"""Values per sketch, which give an estimate a standard deviation of at most 0.045; their seed."""
BANDS = 32
"""Bands of four values, one of which texts with a similarity of 0.5 share with probability 0.87,
those with 0.7 nearly always. The library's own 8 bands for 0.8 miss half of the texts with 0.85."""
SHINGLE = 3
"""Words per shingle; few, because prompts are short."""


def sketch(text: str) -> RMinHash:
    """Returns the MinHash sketch of a text's shingles; a shorter text is one shingle."""
    words = normal_words(text)
    minhash = RMinHash(HASHES, SEED)
    minhash.update(list(grams(words, min(SHINGLE, max(1, len(words))))))
    return minhash


class ExactDuplicates:
    """Texts that were added before."""

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
        """Adds a text unless it is a near duplicate, of which it returns the number. Texts of one
        group, if they have one, are no duplicates of each other."""
        own = _digest(group).hex() if group else ""
        near = (key.partition(" ") for key in self._index.get_duplicates(minhash))
        others = [int(earlier) for earlier, _, its in near if not own or its != own]
        if others:
            return min(others)  # the index has no order
        # The index leaves out a text near one of its group, which stands for both.
        self._index.add(f"{number} {own}", minhash)
        return None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
