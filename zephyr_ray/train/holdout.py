"""Splits validation rows off the training data by their prompts."""

import hashlib
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.models.similarity import split_words
from zephyr_ray.stage import Work
from zephyr_ray.store import ROWS, read_jsonl

Row = dict[str, Any]


def is_held_out(row: Row, share: float) -> bool:
    """Returns whether a row of dialogues or pairs belongs to the validation set, which has about
    this share (0 to 1) of the prompts.

    Depends only on the words of the first question, without case, spacing and punctuation. So no
    prompt is in both sets, sft and dpo hold out the same prompts, and a larger share includes the
    prompts of a smaller one.
    """
    messages = row["messages"] if "messages" in row else row["chosen"]
    prompt = next((m["content"] for m in messages if m["role"] == "user"), "")
    words = " ".join(split_words(prompt)).encode(errors="replace")
    return int.from_bytes(hashlib.sha256(words).digest()[:8]) < share * 2**64


def check_sides(work: Work, source: str, share: float) -> None:
    """Raises Permanent if the share leaves no row of an input to train or to validate on."""
    empty = {True: "validate", False: "train"}
    for row in read_jsonl(work.inputs[source].file(ROWS)):
        empty.pop(is_held_out(row, share), None)
        if not empty:
            return
    raise Permanent(
        f"stage '{work.name}': validation {share:g} leaves no row of '{source}' to "
        f"{min(empty.values())} on; {'raise' if True in empty else 'lower'} "
        f"{work.name}.validation, or name a stage"
    )
