"""Keeps the answers of a model on the storage, so that no answered request is sent again.

    <storage>/answers/<digest of the model>/<writer>.jsonl     {"key": "…", "text": "…", …}

An answer is written before its row program continues, so that only the requests in flight are lost
if the process is killed.
The key hashes the request: messages, sampling, the seed of the stage, and the sample, which tells
equal requests apart. Neither the stage nor its other models are part of it, so an answer is also
found after a stage's content key has changed.
"""

import asyncio
import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zephyr_ray.messages import Message
from zephyr_ray.models.contract import Reply, Sampling, StopRun
from zephyr_ray.store import append_line

ANSWERS = "answers"
"""Folder of all logs, below the storage folder."""
_INDEX_DIGITS = 15
"""Hex digits of a key in the index: 60 bits, which Python keeps in 32 bytes. `find` compares the
complete key."""
_ENTRY = re.compile(rb'\{"key": "([0-9a-f]{%d})' % _INDEX_DIGITS)
"""Matches the start of an entry, so that the index needs no JSON parser."""
_OFFSET_BITS = 40
_ENCODER = json.JSONEncoder(sort_keys=True)


class AnswerLog:
    """The answers of one model, for a stage with this seed. Each process opens the log for itself
    and writes to its own file, so actors on several nodes never share a file."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self._seed = folder, seed
        self._file: Any = None
        self._own = 0
        """Number of the file of this process in `_paths`."""
        self._paths: list[Path] = []
        self._read: list[int] = []
        """Bytes of each file in `_paths` that have been indexed."""
        self._index: dict[int, int] = {}
        """Location of an entry (number of its file, offset) by the start of its key."""
        self.in_flight: dict[str, asyncio.Future[Reply]] = {}
        """Answers that this process waits for, by key."""

    def __reduce__(self) -> tuple[Any, ...]:
        return AnswerLog, (self.folder, self._seed)

    def key(self, messages: list[Message], sampling: Sampling, sample: Any) -> str:
        """Returns the key of a request. Settings of `Sampling` that are None are not part of it."""
        settings = {name: value for name, value in vars(sampling).items() if value is not None}
        request = [messages, settings, self._seed, sample]
        return hashlib.sha256(_ENCODER.encode(request).encode()).hexdigest()

    def find(self, key: str) -> Reply | None:
        """Returns the answer to the request with this key; None if the log has none."""
        place = self._index.get(int(key[:_INDEX_DIGITS], 16))
        if place is None:
            return None
        with self._paths[place >> _OFFSET_BITS].open("rb") as file:
            file.seek(place & ((1 << _OFFSET_BITS) - 1))
            line = file.readline()
        try:
            entry = json.loads(line)
            return _read(entry) if entry.pop("key") == key else None
        except (ValueError, TypeError, KeyError):  # written by a version with other fields
            return None

    def append(self, key: str, reply: Reply) -> None:
        """Writes an answer. Raises StopRun if the storage cannot be written."""
        self.open()
        offset = self._file.tell() + 1  # after the line break that `append_line` begins with
        with self._stops():
            append_line(self._file, {"key": key, **_fields(reply)})
        self._index[int(key[:_INDEX_DIGITS], 16)] = self._own << _OFFSET_BITS | offset

    def open(self) -> None:
        """Opens the file of this process, so that nothing is paid for an answer that cannot be
        kept. Raises StopRun if the storage cannot be written."""
        if self._file is None:
            with self._stops():
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{uuid.uuid4().hex[:12]}.jsonl"
                self._file = path.open("ab", buffering=0)
                self._own = len(self._paths)
                self._paths.append(path)
                self._read.append(0)

    @contextmanager
    def _stops(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StopRun(
                f"answers cannot be written to {self.folder} ({error.strerror}); make the folder "
                "writable and free disk space, then run again"
            ) from error

    def refresh(self) -> None:
        """Adds the entries that all writers appended since the last call to the index."""
        known = set(self._paths)
        new = [path for path in sorted(self.folder.glob("*.jsonl")) if path not in known]
        self._paths += new
        self._read += [0] * len(new)
        for number, path in enumerate(self._paths):
            if path.stat().st_size > self._read[number]:
                self._add(number, path)

    def _add(self, number: int, path: Path) -> None:
        offset = self._read[number]
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written, or its writer was killed
                    break
                # A line without the brace was cut short by a full disk.
                if line.endswith(b"}\n") and (match := _ENTRY.match(line)):
                    self._index[int(match[1], 16)] = number << _OFFSET_BITS | offset
                offset += len(line)
        self._read[number] = offset


def _fields(reply: Reply) -> dict[str, Any]:
    """Returns the fields of an entry; without log-probabilities, the same as earlier versions."""
    return {name: value for name, value in vars(reply).items() if value != ()}


def _read(fields: dict[str, Any]) -> Reply:
    tokens = fields.pop("top_logprobs", ())
    return Reply(**fields, top_logprobs=tuple((text, value) for text, value in tokens))
