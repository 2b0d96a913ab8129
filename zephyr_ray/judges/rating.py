"""Reads a rating on a scale from 1."""

import re
from typing import Any

from zephyr_ray.formatting import shorten
from zephyr_ray.judges.literal import number

CHARACTERS = 20
"""Maximum characters of a rating, such as "8.5 out of 10"."""


def read_rating(value: Any, highest: int) -> float | None:
    """Reads a rating from 1 to `highest` from a number or a text such as "4", "4/5" or
    "4 out of 5". Returns None if the value is not such a rating."""
    text = str(value).strip()
    if len(text) > CHARACTERS:
        return None
    rating = number(re.sub(rf"\s*(?:/|out of)\s*{highest}$", "", text))
    return rating if rating is not None and 1 <= rating <= highest else None


def describe_fault(name: str, value: Any, highest: int) -> str:
    """Returns the error text for a value that `read_rating` cannot read."""
    return f'its "{name}" is {shorten(str(value), 40)!r}, not a number from 1 to {highest}'


def whole_numbers(highest: int) -> dict[str, Any]:
    """Returns the JSON schema of a rating. It lists the values, because some engines for guided
    decoding do not support bounds, and states the type, because OpenAI requires it."""
    return {"type": "integer", "enum": list(range(1, highest + 1))}
