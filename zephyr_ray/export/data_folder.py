"""Writes the rows of an artifact as JSONL shards that `datasets.load_dataset` reads."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.export.columns import column_types, to_features
from zephyr_ray.store import ROWS, Artifact, read_jsonl

SHARD_BYTES = 256 << 20
"""Maximum bytes per file, unless one row has more."""
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
"""The hub's names of size categories, with their exclusive upper bounds in rows."""


def write_data(artifact: Artifact, folder: Path) -> dict[str, Any]:
    """Writes data/train-….jsonl; returns what the card's front matter states about the files.
    Raises Permanent if there are no rows."""
    source = artifact.file(ROWS)
    parts = _write_shards(source, folder / "data")
    if not parts:
        raise Permanent(f"{source} has no rows, so there is no data set to export")
    names = [f"data/train-{n:05d}-of-{len(parts):05d}.jsonl" for n in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    rows = int(artifact.manifest.counts.get("rows", 0))
    # Listed one by one, because the repository may have other files from an earlier push.
    files = [{"split": "train", "path": names}]
    return {
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if rows < limit), "1M<n<10M")],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": to_features(column_types(read_jsonl(source)))},
    }


def _write_shards(source: Path, folder: Path) -> list[Path]:
    """Writes the lines to files of at most SHARD_BYTES and returns the files."""
    folder.mkdir(parents=True)
    parts: list[Path] = []
    with source.open("rb") as rows, ExitStack() as stack:
        size = SHARD_BYTES
        for line in rows:
            size += len(line)
            if size > SHARD_BYTES:
                stack.close()
                parts.append(folder / f"part-{len(parts)}")
                file = stack.enter_context(parts[-1].open("wb"))
                size = len(line)
            file.write(line)
    return parts
