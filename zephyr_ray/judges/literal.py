"""Parses a Python or JSON literal in a model's reply, without executing anything."""

import ast
import json
from typing import Any


def parse_literal(text: str) -> Any:
    """Returns the value of a JSON or Python literal, or None if the text is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None
