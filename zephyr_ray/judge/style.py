"""Measures how the styles of two answers differ, to control ratings for length and Markdown."""

import re

FEATURES = ("length", "headers", "lists", "bold")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_MARKDOWN = (
    re.compile(r"^ {0,3}#{1,6}[ \t]", re.MULTILINE),
    re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)
"""Headers, list items and bold passages."""


def style_difference(first: str, second: str) -> tuple[float, ...]:
    """Returns the FEATURES of the first answer minus those of the second, as Arena-Hard v2 compares
    them: length as (a − b) / (a + b) in characters, and counts of Markdown per character."""
    total = len(first) + len(second)
    length = (len(first) - len(second)) / total if total else 0.0
    densities = zip(_densities(first), _densities(second), strict=True)
    return (length, *(a - b for a, b in densities))


def _densities(text: str) -> list[float]:
    prose = _CODE.sub("", text)
    return [len(pattern.findall(prose)) / max(1, len(text)) for pattern in _MARKDOWN]
