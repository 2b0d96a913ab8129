"""Reads a Python or JSON literal from a model's reply. The reply is data: nothing is executed."""

import ast
import json
from typing import Any


def literal(text: str) -> Any:
    """Returns the value of a JSON or Python literal, or None if the text is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None
