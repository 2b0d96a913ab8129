"""Tokenizes a text piece by piece and remembers the ids of each piece, because most of a text is
words that occurred before, and a tokenizer spends most of its time on splitting text into them."""

import re
import string
from collections.abc import Callable
from itertools import chain
from typing import Any

_LEFT = string.ascii_letters + string.digits + ".,:;!?'\")"
_BREAKS = re.compile(f" (?<=[{_LEFT}] )(?=[A-Za-z])")
"""Matches the boundary of two pieces: a single space between a character that ends a word and a
letter. The last characters of control tokens are not in _LEFT, because some tokenizers insert
another space after such tokens."""
_SPANNING = re.compile(f"[{_LEFT}][Ġ▁]")
"""Matches within a token that spans two pieces. Vocabularies write a space as Ġ or ▁."""
_MOST_PIECES, _LONGEST_PIECE = 2**18, 40
"""Maximum pieces that are remembered (about 60 MB), and their maximum characters."""
_PROBE = "".join(f"{left} {right}x" for left in _LEFT for right in "aZ")
"""A text in which every character that can end a piece does."""

Encode = Callable[[str], list[int]]


def by_pieces(backend: Any, control: list[str], encode: Encode) -> Encode:
    """Returns a function that encodes a text as `encode` does, but faster; `encode` itself if its
    tokens may depend on more than one piece.

    `backend` is the tokenizer that `encode` runs. No token spans two pieces if no entry of the
    vocabulary does, because BPE merges only tokens into tokens. The rest of a tokenizer
    (normalizer, pre-tokenizer) looks at classes of characters, so a probe of all of them and of the
    control tokens shows whether it depends on more than one piece.
    """
    is_bpe = type(backend.model).__name__ == "BPE" and not backend.model.dropout
    added = backend.get_added_tokens_decoder().values()
    reach_further = any(token.rstrip or _BREAKS.search(token.content) for token in added)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if not is_bpe or reach_further or any(map(_SPANNING.search, vocabulary)):
        return encode
    probe = _PROBE + "".join(f"{token} a" for token in control)
    expected = encode(probe)
    # The space belongs to the piece after it; some tokenizers write one before every text.
    for pieces in (Pieces(encode, " "), Pieces(encode, "")):
        if pieces.encode(probe) == expected:
            return pieces.encode
    return encode


class Pieces:
    """Encodes texts piece by piece."""

    def __init__(self, encode: Encode, before: str):
        """`before` is the text to encode before a piece that follows another one."""
        self._first, self._known = _Known(encode, ""), _Known(encode, before)

    def encode(self, text: str) -> list[int]:
        first, *pieces = _BREAKS.split(text)
        ids = list(self._first[first])
        ids.extend(chain.from_iterable(map(self._known.__getitem__, pieces)))
        return ids


class _Known(dict[str, tuple[int, ...]]):
    """The ids of pieces; encodes a piece that is not known yet."""

    def __init__(self, encode: Encode, before: str):
        super().__init__()
        self._encode, self._before = encode, before

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(self._encode(self._before + piece))
        if len(piece) <= _LONGEST_PIECE:
            if len(self) >= _MOST_PIECES:
                self.clear()
            self[piece] = ids
        return ids
