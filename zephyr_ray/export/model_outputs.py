"""Writes completions in the format of AlpacaEval's model outputs, one file per model."""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from zephyr_ray.store import ROWS, Artifact, read_jsonl

NAME = "model_outputs"
NOTE = (
    "`model_outputs` has each model's first answer to each prompt, in AlpacaEval's format; system "
    "prompts are left out."
)


def write_model_outputs(artifact: Artifact, folder: Path) -> str:
    """Writes model_outputs.json, or model_outputs/<model>.json if several models answered. Returns
    the card's sentence about them."""
    files: dict[str, TextIO] = {}
    names: dict[str, str] = {}
    (folder / NAME).mkdir()
    with ExitStack() as stack:
        for row in read_jsonl(artifact.file(ROWS)):
            first = {answer["model"]: answer for answer in reversed(row["completions"])}
            for model, answer in first.items():
                separator = ",\n" if model in files else "[\n"
                if model not in files:
                    names[model] = _file_name(model, set(names.values()))
                    path = folder / NAME / names[model]
                    # A lone surrogate, which JSON can hold but UTF-8 cannot, becomes a question
                    # mark, as in the rows.
                    files[model] = stack.enter_context(
                        path.open("w", encoding="utf-8", errors="replace")
                    )
                text = json.dumps(_output(row, answer), ensure_ascii=False)
                files[model].write(f"{separator}{text}")
        for file in files.values():
            file.write("\n]\n")
    if len(names) == 1:
        [name] = names.values()
        (folder / NAME / name).rename(folder / f"{NAME}.json")
        (folder / NAME).rmdir()
    return NOTE


def _output(row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "dataset": row.get("source"),
        "instruction": row["prompt"],
        "output": answer["text"],
        "generator": answer["model"],
        "finish_reason": answer.get("finish_reason"),
        "tokens": answer.get("tokens"),
    }


def _file_name(model: str, taken: set[str]) -> str:
    """Returns a file name for a model, whose name may hold any characters."""
    stem = re.sub(r"[^\w.-]+", "-", model)
    name, number = f"{stem}.json", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.json"
    return name
