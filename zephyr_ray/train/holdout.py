"""Splits validation rows off the training data by their prompts."""

import hashlib
from typing import Any

from zephyr_ray.models.similarity import split_words

Row = dict[str, Any]


def is_held_out(row: Row, share: float) -> bool:
    """Returns whether a row of dialogues or pairs belongs to the validation set, which has about
    this share (0 to 1) of the prompts.

    Depends only on the words of the first question, without case, spacing and punctuation. So no
    prompt is on both sides, sft and dpo hold out the same prompts, and a larger share holds out
    those of a smaller one.
    """
    prompt = next((m["content"] for m in _messages(row) if m["role"] == "user"), "")
    words = " ".join(split_words(prompt)).encode(errors="replace")
    return int.from_bytes(hashlib.sha256(words).digest()[:8]) < share * 2**64


def _messages(row: Row) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = row["messages"] if "messages" in row else row["chosen"]
    return messages
