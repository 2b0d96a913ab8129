"""Chooses the rows that a report shows."""

import heapq
from hashlib import sha256
from typing import Any

NOT_HAND_PICKED = "Not hand-picked: the {rows} whose ids have the smallest SHA-256 hashes."
"""Explains the choice, below a heading in the report."""


def blind_sample(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns the rows whose ids have the smallest hashes, a choice blind to their answers."""
    return heapq.nsmallest(count, rows, key=lambda row: sha256(str(row["id"]).encode()).hexdigest())
