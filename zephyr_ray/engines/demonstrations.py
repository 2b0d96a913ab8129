"""Reads a model's demonstrations: earlier turns that show how to answer prompts of one kind."""

from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.messages import Message, assistant, user
from zephyr_ray.models import constraints
from zephyr_ray.store import numbered_jsonl, read_jsonl


def check(path: Path) -> None:
    """Raises Permanent unless every row has an instruction, an answer and a valid constraint."""
    for number, row in numbered_jsonl(path):
        for field in ("instruction", "answer"):
            if not isinstance(row.get(field), str):
                raise Permanent(f'{path} line {number}: needs an "{field}" that is text; add one')
        try:
            constraints.validate(row.get("constraint") or {})
        except Permanent as error:
            raise Permanent(f"{path} line {number}: {error}") from None


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows, each with a `prompt` made of its instruction and constraint."""
    rows = []
    for row in read_jsonl(path):
        sentence = constraints.KINDS[row["constraint"]["kind"]].phrasings[0]
        prompt = f"{row['instruction']} {sentence.format(**row['constraint'])}"
        rows.append({**row, "prompt": prompt})
    return rows


def turns(rows: list[dict[str, Any]], kind: str | None) -> list[Message]:
    """Returns the demonstrations for one kind of constraint as turns of a conversation."""
    return [
        message
        for row in rows
        if row["constraint"]["kind"] == kind
        for message in (user(row["prompt"]), assistant(row["answer"]))
    ]
