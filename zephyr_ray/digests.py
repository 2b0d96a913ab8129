"""Computes SHA-256 of files, and remembers on each node which large files it has read.

    ~/.cache/zephyr_ray/digests/<node>/<folder>.json    per file: size, mtime, ctime, SHA-256

The file system sets a file's ctime at every change, and no program can set it back, so a file with
the remembered size, mtime and ctime has the remembered content. The records are a cache: a lost or
unwritable one costs one more read.
"""

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

SMALL_BYTES = 1 << 20
"""Bytes below which a file is read each time, which costs no more than keeping a record."""
MAX_RECORDS = 1000
"""Maximum folders with a record, and maximum files per record; the oldest are forgotten."""
TICK_SECONDS, COARSE_SECONDS = 0.02, 2.0
"""Coarsest resolution of file times with fractions of a second, and of those without."""


@dataclass(frozen=True)
class Stamp:
    """Size and times of a file, which show a change of its content without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int


def stamp(path: Path) -> Stamp:
    """Returns the file's stamp. Opens the file, because NFS revalidates attributes only then."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
    return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_digest(path: Path) -> tuple[Stamp, str]:
    """Reads the file; returns its stamp and digest, which are remembered if the file is large."""
    before = stamp(path)
    # A change within the resolution of file times would not be visible in the stamp.
    resolution = TICK_SECONDS if before.ctime_ns % 10**9 else COARSE_SECONDS
    age = time.time() - before.ctime_ns / 1e9
    time.sleep(min(max(0.0, resolution - age), resolution))
    digest = file_digest(path)
    if before.size >= SMALL_BYTES and stamp(path) == before:
        _remember(path, before, digest)
    return before, digest


def known_digest(path: Path) -> str:
    """Returns the file's digest; reads the file if it is small, new to this node, or changed."""
    match _entries(path).get(path.name):
        case [size, mtime, ctime, str(digest)] if stamp(path) == Stamp(size, mtime, ctime):
            return digest
    return read_digest(path)[1]


def is_remembered(path: Path) -> bool:
    """Returns whether this node has read the file, or an earlier version of it."""
    return path.name in _entries(path)


def _record(path: Path) -> Path:
    """Returns the record of the file's folder on this node."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(path.absolute().parent)).hexdigest()[:32]
    # Nodes that share a home folder may have different files under the same path.
    return cache / "zephyr_ray" / "digests" / platform.node() / f"{name}.json"


def _entries(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(_record(path).read_bytes())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the user has no home folder
        return {}
    return entries if isinstance(entries, dict) else {}


def _remember(path: Path, seen: Stamp, digest: str) -> None:
    entries = _entries(path)
    entries.pop(path.name, None)
    entries[path.name] = [*astuple(seen), digest]
    text = json.dumps(dict(list(entries.items())[-MAX_RECORDS:]))
    with contextlib.suppress(OSError, RuntimeError):
        record = _record(path)
        record.parent.mkdir(parents=True, exist_ok=True)
        part = record.with_name(f".{record.name}.{os.getpid()}-{threading.get_ident()}")
        part.write_text(text)
        part.replace(record)
        records = list(record.parent.iterdir())
        if len(records) > MAX_RECORDS:
            min(records, key=lambda file: file.stat().st_mtime).unlink()
