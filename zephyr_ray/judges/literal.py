"""Finds JSON and Python literals in a model's reply, in one pass, without executing anything."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DEPTH = 20
"""Maximum nesting of a literal; a verdict needs 3."""

_OPENER = re.compile(r"[\[{]")
_TOKEN = re.compile(
    r"\s*+(?:(?P<sign>[\[\]{}:,])"
    r"|(?P<quoted>\"[^\"\\]*+(?:\\.[^\"\\]*+)*+\"|'[^'\\]*+(?:\\.[^'\\]*+)*+')"
    r"|(?P<word>[\w.+/%-]++))",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_NUMBER = re.compile(r"\s*([+-]?[0-9]+(?:\.[0-9]*)?)\s*")


@dataclass(frozen=True)
class Literal:
    """A list or an object in a text, `text[start:end]`.

    All its scalars are strings ("8" and 8 are the same). A key that has two different values in one
    object has the value None.
    """

    start: int
    end: int
    value: Any


def literals(text: str) -> Iterator[Literal]:
    """Yields the outermost lists and objects, in order; brackets in prose or code are skipped.

    Reads what models write: both kinds of quotes, raw line breaks in strings, trailing commas and
    bare words. Takes time proportional to the text's length.
    """
    position = 0
    while opener := _OPENER.search(text, position):
        reader = _Reader(text, opener.start())
        try:
            reader.value(depth=0)
        except _NotLiteral:
            position = reader.resume
        else:
            position = reader.position
        yield from reader.complete


def number(value: Any) -> float | None:
    """Returns a scalar of a literal as a number; None if it is not one."""
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    return float(match[1]) if match else None


class _NotLiteral(Exception):
    """A bracket that begins no literal."""


class _Reader:
    """Reads one literal by recursive descent."""

    def __init__(self, text: str, position: int):
        self._text, self._begin = text, position
        self.position = position
        self.resume = position + 1
        """Position at which the search continues if this is not a literal: the last bracket, or
        inside the last string, because a stray quote may have begun it."""
        self.complete: list[Literal] = []
        """The outermost lists and objects that were read completely."""

    def value(self, depth: int) -> Any:
        start, token = self._next()
        if token not in ("[", "{"):
            return self._scalar(token)
        if depth == DEPTH:
            raise _NotLiteral
        inner = len(self.complete)
        value = self._list(depth) if token == "[" else self._object(depth)
        self.complete[inner:] = [Literal(start, self.position, value)]
        return value

    def _list(self, depth: int) -> list[Any]:
        entries = []
        while not self._ends("]"):
            entries.append(self.value(depth + 1))
            self._separator("]")
        return entries

    def _object(self, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not self._ends("}"):
            key = self._scalar(self._next()[1])
            if self._next()[1] != ":":
                raise _NotLiteral
            value = self.value(depth + 1)
            entries[key] = value if entries.get(key, value) == value else None
            self._separator("}")
        return entries

    def _scalar(self, token: str) -> str:
        if token in ("[", "]", "{", "}", ":", ","):
            raise _NotLiteral
        return _unescaped(token[1:-1]) if token[0] in "\"'" else token

    def _separator(self, end: str) -> None:
        token = self._peek()
        if token and token["sign"] == ",":
            self._next()
        elif not (token and token["sign"] == end):
            raise _NotLiteral

    def _ends(self, sign: str) -> bool:
        """Consumes the sign if it comes next; returns whether it did."""
        token = self._peek()
        if token and token["sign"] == sign:
            self._next()
            return True
        return False

    def _peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self._text, self.position)

    def _next(self) -> tuple[int, str]:
        """Consumes the next token and returns its start and text."""
        token = self._peek()
        if token is None or not token.lastgroup:
            raise _NotLiteral
        start = token.start(token.lastgroup)
        self.position = token.end()
        is_inner = token["sign"] in ("[", "{") and start > self._begin
        self.resume = start if is_inner else start + 1 if token["quoted"] else self.position
        return start, token[token.lastgroup]


def _unescaped(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        name = match[1]
        return chr(int(name[1:], 16)) if len(name) == 5 else _ESCAPES.get(name, name)

    # Two escapes may form one character; one alone cannot be encoded as UTF-8.
    units = _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass")
    return units.decode("utf-16", "replace")
