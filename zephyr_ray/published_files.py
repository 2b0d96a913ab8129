"""Reads the files of published data, row by row: Parquet, JSONL or Arrow, or a JSON list."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.published_rows import Row
from zephyr_ray.store import numbered_jsonl

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".arrow": "arrow"}
FIRST = 1000
"""Maximum rows searched for a usable one before the data is refused."""

SPLIT_WORDS = re.compile("train|test|valid|eval|dev")
"""Matches file names that mention a split."""


def data_files(path: Path, split: str) -> list[Path]:
    """Returns the data files that `files:` names, sorted by name. Raises Permanent if there are
    none, none of the split, or files of several formats."""
    # In a folder, a .json file may be metadata, such as those of `Dataset.save_to_disk`.
    if path.is_file() and path.suffix in (*FORMATS, ".json"):
        return [path]
    if path.is_file():
        raise Permanent(
            f"{path} has an unsupported format; convert it to JSONL (one object per line), Parquet "
            "or Arrow"
        )
    matches = (p for p in path.rglob("*") if p.is_file() and p.suffix in FORMATS)
    files = sorted(p for p in matches if not re.search(r"(^|/)\.", str(p.relative_to(path))))
    if not files:
        raise Permanent(f"{path} has no {' or '.join(FORMATS)} file; change the files setting")
    # UltraChat numbers its files: train_0.jsonl, train_1.jsonl, …
    split_files = [p for p in files if re.match(rf"{re.escape(split)}([-.]|_\d+\.)", p.name)]
    if not split_files and (split != "train" or any(SPLIT_WORDS.search(p.name) for p in files)):
        raise Permanent(
            f"{path} has no file of split '{split}'; it has "
            f"{', '.join(p.name for p in files[:5])}; set split to the part of a file name before "
            "the first - or ."
        )
    files = split_files or files
    if len(formats := sorted({p.suffix for p in files})) > 1:
        raise Permanent(f"{path} has {' and '.join(formats)} files; keep one format per folder")
    return files


def first_rows(path: Path) -> Iterable[Row]:
    """Returns the first rows of a file (of a JSON file all, read on demand); for a file without
    rows, one row whose columns are all None. Raises Permanent if the file is not valid, or if it
    is a JSON file without rows, because its columns are then unknown."""
    if path.suffix in (".json", ".jsonl"):
        lines = (row for _, row in located_rows(path))
        if (first := next(lines, None)) is None:
            raise Permanent(f"{path} has no rows; change the files setting")
        return chain([first], lines)
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as source:
                return _first(source.schema_arrow.names, source.iter_batches(batch_size=FIRST))
        with pa.memory_map(str(path)) as file:
            try:
                stream = pa.ipc.open_stream(file)
                return _first(stream.schema.names, stream)
            except pa.ArrowInvalid:
                blocks = pa.ipc.open_file(file)
                numbers = range(blocks.num_record_batches)
                return _first(blocks.schema.names, map(blocks.get_batch, numbers))
    except (pa.ArrowInvalid, OSError) as error:
        raise Permanent(
            f"{path} is not a valid {path.suffix[1:]} file, or is truncated: {error}; copy it again"
        ) from None


def _first(names: list[str], batches: Iterable[Any]) -> list[Row]:
    rows = (row for batch in batches for row in batch.slice(0, FIRST).to_pylist())
    return list(islice(rows, FIRST)) or [dict.fromkeys(names)]


def located_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields all rows of a JSON or Parquet file, each with its location for error lines. A .json
    file may hold a list, like AlpacaEval's, or JSON Lines. Raises Permanent if a row is not an
    object."""
    if path.suffix == ".parquet":
        rows = stream(str(path), "parquet", str(path))
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
    elif path.suffix == ".json" and is_json_list(path):
        for where, row in json_list(path):
            if not isinstance(row, dict):
                raise Permanent(f"{where}: not a JSON object; write a list of objects")
            yield where, row
    else:
        yield from ((f"{path} line {number}", row) for number, row in numbered_jsonl(path))


def is_json_list(path: Path) -> bool:
    """Returns whether a file begins like a JSON list."""
    try:
        with path.open("rb") as file:
            return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    except OSError as error:
        raise Permanent(f"cannot read {path}: {error.strerror}; correct the path") from None


def json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the items of a file with a JSON list, each with its location for error lines. Raises
    Permanent if the file is not JSON."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise Permanent(f"{path} is not JSON; correct it") from None
    yield from ((f"{path} example {number}", item) for number, item in enumerate(items, 1))


def stream(files: str | None, loader: str, source: str, **options: Any) -> Iterator[Row]:
    """Yields rows one by one, with a few hundred in memory. Raises Permanent if the loader
    fails."""
    from datasets import load_dataset

    if files:
        options = {"data_files": files, "split": "train"}
    try:
        yield from load_dataset(loader, streaming=True, **options)
    except Exception as error:  # no network, no such data set or split, a truncated file, …
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fix = "path or address" if files else "name or the network, or set files: to a local copy"
        raise Permanent(f"cannot read {source}: {reason}; correct the {fix}") from error
