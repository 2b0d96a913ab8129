"""Encodes a template's text so that only the template can write control tokens."""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from zephyr_ray.chat.pieces import by_pieces
from zephyr_ray.errors import Permanent, RowError

MARK = "\ufdd0"
"""A noncharacter that marks a control token typed in a message; the encoder removes it again."""
NEUTRAL = "\x01"
"""A character that merges with no text after it."""


def control_tokens(tokenizer: Any, written: str) -> dict[int, Any]:
    """Returns the tokens that give a conversation its structure, by id.

    These are the special tokens, and the added tokens that the format itself writes (`written` is a
    conversation in this format). White space and words that a tokenizer keeps as added tokens
    belong to ordinary text, even if the format writes them.
    """

    def structural(token: str) -> bool:
        symbols = [letter for letter in token if not (letter.isalnum() or letter.isspace())]
        return len(token) > 1 and bool(symbols) and token in written

    return {
        number: token
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or structural(token.content)
    }


class Encoder:
    """A copy of a tokenizer; it recognizes a format's control tokens, unless they are marked."""

    def __init__(self, tokenizer: Any, control: dict[int, Any]):
        from tokenizers import AddedToken, Tokenizer, normalizers

        if not getattr(tokenizer, "is_fast", False):
            raise Permanent(
                f"the tokenizer ({type(tokenizer).__name__}) has no fast version; "
                "give the model folder a tokenizer.json"
            )
        self._control = {number: token.content for number, token in control.items()}
        self._unknown = tokenizer.unk_token_id
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        # Control tokens are matched before the normalizer runs; it then removes the marks, so that
        # typed control tokens become ordinary text.
        flags = ("lstrip", "rstrip", "single_word")
        backend.add_special_tokens(
            [
                AddedToken(
                    token.content,
                    special=True,
                    normalized=False,
                    **{flag: getattr(token, flag) for flag in flags},
                )
                for token in control.values()
            ]
        )
        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Replace(MARK, ""), *own])
        self._backend = backend
        tokens = list(self._control.values())
        self._encode = by_pieces(backend, tokens, self._encode_whole)
        longest_first = sorted(tokens, key=len, reverse=True)
        self._whole = _any_of(map(re.escape, longest_first))
        # Only the first character is consumed, so that overlapping tokens are all marked.
        starts = (f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in tokens)
        self._start = _any_of(starts)

    def mark(self, text: str) -> str:
        """Marks typed control tokens, so that `encode` treats them as text."""
        if MARK in text:
            raise RowError(f"a message contains the noncharacter U+{ord(MARK):04X}")
        return self._start.sub(lambda match: match.group() + MARK, text)

    def unmark(self, text: str) -> str:
        return text.replace(MARK, "")

    def find_control(self, text: str, start: int) -> re.Match[str] | None:
        """Returns the first control token at or after `start`."""
        return self._whole.search(text, start)

    def has_control(self, ids: list[int], text: str) -> bool:
        """Returns whether the ids contain the unknown token, or a control token whose name is in
        the text. (Other control tokens may stand for single bytes.)"""
        tokens = self._control.keys() & set(ids)
        return self._unknown in ids or any(self._control[token] in text for token in tokens)

    def encode(self, text: str, after: str = "") -> list[int]:
        """Returns the ids of a text that follows the control token `after`."""
        try:
            ids = self._encode(after + text)
        except TypeError:
            raise RowError("a message is not valid Unicode: it has half a surrogate pair") from None
        return ids[1:] if after else ids

    def _encode_whole(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_turn(self, lead: str, answer: str, after: str = "") -> tuple[list[int], list[int]]:
        """Returns the ids of a lead and of the answer that follows it.

        They are tokenized together, as in the template, unless a token would span both (an answer
        that starts with whitespace), because generation starts after the lead.
        """
        # No token spans a control token, so only the text after the last one is tokenized twice.
        start, last = 0, after
        for control in self._whole.finditer(lead):
            start, last = control.end(), control.group()
        far, near = self.encode(lead[:start], after), lead[start:]
        head, both = self.encode(near, last), self.encode(near + answer, last)
        if both[: len(head)] == head:
            return far + head, both[len(head) :]
        return far + head, self.encode(NEUTRAL + answer)[len(self.encode(NEUTRAL)) :]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids as part of a longer text, because some tokenizers drop a space at
        the start of a text."""
        letter, length = self._letter
        text: str = self._backend.decode([*letter, *ids], skip_special_tokens=False)
        return text[length:]

    def round_trips(self, text: str) -> tuple[str, str]:
        """Returns a text encoded and decoded on its own, with and without the space that some
        tokenizers write before it."""
        alone = self.decode(self.encode(self.mark(text)))
        return alone, alone.removeprefix(" ")

    @cached_property
    def _letter(self) -> tuple[list[int], int]:
        """The ids of a letter, and the length of their text."""
        ids = self.encode("a")
        return ids, len(self._backend.decode(ids, skip_special_tokens=False))


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the patterns, and never matches if there are none."""
    return re.compile("|".join(patterns) or "(?!)")
