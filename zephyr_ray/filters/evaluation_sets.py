"""Reads the questions of evaluation sets from files in their published forms.

Known forms are those of MT-Bench (`turns`), AlpacaEval (`instruction`), HellaSwag (`ctx`), ARC
(`question`, as text or with a `stem`), TruthfulQA and others (`question`), and any file with a
`prompt`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.published_files import is_json_list, json_list
from zephyr_ray.store import numbered_jsonl

MAX_BYTES = 50_000_000
"""Maximum bytes of all files; the validation set of HellaSwag, the largest of those above, has 12
MB."""
FIELDS = ("turns", "prompt", "instruction", "ctx", "question", "stem", "content")
"""Fields that may hold a question, in order of priority; the last two are for an object inside
another field."""
NAMED = "name the column prompt, instruction, question, ctx or turns"


def read_sets(path: Path) -> dict[str, list[str]]:
    """Returns the questions by the name of their set, from a file, or from a folder with one file
    per set. Raises Permanent if a file cannot be used."""
    sets: dict[str, list[str]] = {}
    for file in _files(path):
        name = str(file.relative_to(path).with_suffix("")) if file != path else path.stem
        texts = [text for where, row in _rows(file) for text in _questions(row, where)]
        if not texts:
            raise Permanent(f"{file} has no examples; remove it")
        # A .json and a .jsonl file may have one name.
        sets[name] = list(dict.fromkeys([*sets.get(name, ()), *texts]))
    return sets


def _files(path: Path) -> list[Path]:
    files = [path]
    if path.is_dir():
        below = (p for p in path.rglob("*") if p.is_file())
        files = sorted(p for p in below if not any(n[0] == "." for n in p.relative_to(path).parts))
        if not files:
            raise Permanent(f"{path} has no files; add one JSONL or JSON file per evaluation set")
    for file in files:
        if file.suffix not in (".jsonl", ".json"):
            raise Permanent(f"{file} is neither a .jsonl nor a .json file; convert or remove it")
    if (size := sum(file.stat().st_size for file in files)) > MAX_BYTES:
        raise Permanent(
            f"{path} has {size} bytes, more than {MAX_BYTES}; keep only the splits you evaluate"
        )
    return files


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields the examples of a file, each with its location for error lines. A .json file may hold
    a list, like AlpacaEval's, or JSON Lines, like MT-Bench's. Raises Permanent if it is not
    JSON."""
    if file.suffix == ".json" and is_json_list(file):
        yield from json_list(file)
    else:
        yield from ((f"{file} line {number}", row) for number, row in numbered_jsonl(file))


def _questions(value: Any, where: str) -> list[str]:
    """Returns the questions in the first known field of an example, which may hold a text, an
    object with a known field, or a list of these, such as turns or messages. Raises Permanent if
    there are none."""
    texts, pending = list[str](), [value]
    while pending:
        match pending.pop(0):
            case str(text) if text.strip():
                texts.append(text)
            case list(parts):
                pending = [part for part in parts if _is_asked(part)] + pending
            case dict(fields) if names := [name for name in FIELDS if name in fields]:
                pending.insert(0, fields[names[0]])
    if not texts:
        raise Permanent(f"{where}: no question; {NAMED}")
    return texts


def _is_asked(part: Any) -> bool:
    """Returns whether a part of a list may be a question: a message of the user, or anything that
    is not a message."""
    return not isinstance(part, dict) or part.get("role", "user") == "user"
