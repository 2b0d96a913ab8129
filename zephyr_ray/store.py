"""Stores artifacts under content keys; an artifact is complete once it has a manifest.

    <storage>/store/<kind>-<key>/manifest.json     written last
    <storage>/store/<kind>-<key>/…                 rows.jsonl, model/, report.html, …
    <storage>/<recipe name>/{data,models}/<stage>  links to open results by stage name
    <storage>/answers, spending                    answers of models by request; what they cost

A folder without a manifest is unfinished work; a restart resumes from its journals and checkpoints.
Keys hash inputs, never outputs, because generation is not deterministic: kind and version, settings
(except operational ones), contents of files, models' settings, and keys of the artifacts read.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

from zephyr_ray.digests import known_digest
from zephyr_ray.errors import Permanent
from zephyr_ray.lease import Lease, interruptible
from zephyr_ray.lease_owner import ATTEMPT_VARIABLE, JOB_VARIABLE
from zephyr_ray.manifest import MANIFEST, Manifest, read_manifest, storable
from zephyr_ray.verification import corrupted, describe, is_unchanged, matches_when_read, verify

STORE, LEASE = "store", ".lease"
"""Folder of all artifacts, in the storage folder, and the folder of the lock inside it."""
SCRATCH = "scratch"
"""Folder for journals and checkpoints of unfinished work; not part of the artifact."""
ROWS = "rows.jsonl"
ONE_PER_LINE = "write one complete JSON object per line"
MAX_PATH_BYTES = 400
"""Maximum bytes of the storage folder's path; SQLite opens paths of up to 512."""
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def content_key(parts: dict[str, Any]) -> str:
    """Returns 16 hex digits (64 bits) of SHA-256 over canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """Returns a file's SHA-256 (64 hex digits), or a folder's content key over its file names and
    contents (16 hex digits)."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return content_key({str(f.relative_to(path)): known_digest(f) for f in files})
        return known_digest(path)
    except OSError as error:
        raise Permanent(f"cannot read {path}: {error.strerror}; check the path") from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file. Raises Permanent with the line number if a line is
    malformed."""
    return (row for _, row in numbered_jsonl(path))


def numbered_jsonl(
    path: Path, start: int = 0, first: int = 1, lines: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a JSONL file, each with its line number. Reads all lines by default;
    otherwise `lines` lines from line `first`, which begins at byte `start`. Raises Permanent if the
    file or a line cannot be read."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise Permanent(f"cannot read {path}: {error.strerror}; correct the path") from None
    with file:
        file.seek(start)
        for number, line in enumerate(islice(file, lines), first):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise Permanent(f"{path} line {number}: not UTF-8; convert it to UTF-8") from None
            except (ValueError, RecursionError):
                fix = ONE_PER_LINE if line.lstrip()[:1] in b"[{" else "correct the line"
                raise Permanent(f"{path} line {number}: not JSON; {fix}") from None
            if not isinstance(row, dict):
                raise Permanent(f"{path} line {number}: not a JSON object; {ONE_PER_LINE}")
            yield number, row


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file; no reader sees, and no crash leaves, a partial file."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def append_line(file: FileIO, entry: dict[str, Any]) -> None:
    """Appends an entry to an unbuffered file. Raises OSError unless all of it was written."""
    # The leading line break ends a line that a killed process or a full disk may have cut short.
    line = b"\n" + _ENCODER.encode(entry).encode(errors="replace") + b"\n"
    if file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Journal:
    """Finished rows or steps of a running stage, one JSON line each.

    Each writer has its own file in `folder`, so that actors on several nodes never share one.
    Readers skip a line whose writer was killed halfway.
    """

    def __init__(
        self, folder: Path, writer: str | None = None, since: dict[Path, int] | None = None
    ):
        """Reads only what follows `since`, the `position` of another journal of this folder."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{writer}.jsonl").open("ab", buffering=0) if writer else None
        self._read = dict(since or {})

    @property
    def position(self) -> dict[Path, int]:
        """Bytes read so far, per file."""
        return dict(self._read)

    def append(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        append_line(self._file, entry)

    def sync(self) -> None:
        """Flushes entries to the storage; on NFS, other machines see unflushed entries late."""
        assert self._file is not None
        os.fsync(self._file.fileno())

    def read_new(self, of_others: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the entries since the last call, from all writers or from all others."""
        for path in sorted(self.folder.glob("*.jsonl")):
            if of_others and self._file and self._file.name == str(path):
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read[path] = self._read.get(path, 0) + len(line)
                    with suppress(ValueError):
                        yield json.loads(line)


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    def rows(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.file(ROWS)))

    def file(self, name: str) -> Path:
        """Returns the path of a file to read. Raises Permanent if its content has changed."""
        verify(self.folder, self.manifest, name)
        return self.folder / name


class Store:
    """The artifacts below one storage folder."""

    def __init__(self, storage: Path, read_all: bool = False):
        """With `read_all`, `find` reads every byte of an artifact."""
        self.storage = storage.absolute()
        self.root = self.storage / STORE
        self._intact = matches_when_read if read_all else is_unchanged
        self._lease: Lease | None = None

    def prepare(self) -> None:
        """Creates the folder. Raises Permanent if it cannot hold the files and links of a run."""
        problem, probe = "is not writable", self.root / f".probe-{uuid.uuid4().hex}"
        try:
            if set("?%") & set(str(self.storage)):
                problem = "has a path that MLflow cannot use"
                raise OSError(errno.EINVAL, "its database URL ends at a '?' and decodes a '%'")
            if len(os.fsencode(self.storage)) > MAX_PATH_BYTES:
                raise OSError(errno.ENAMETOOLONG, f"more than {MAX_PATH_BYTES} bytes")
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
            problem = "cannot hold symbolic links"
            probe.symlink_to(STORE)
            probe.unlink()
        except OSError as error:
            raise Permanent(
                f"storage folder {self.storage} {problem} ({error.strerror}); "
                "choose another with --set storage=FOLDER"
            ) from None

    def folder(self, kind: str, key: str) -> Path:
        return self.root / f"{kind}-{key}"

    def find(self, kind: str, key: str) -> Artifact | None:
        """Returns the complete artifact of this key, or None.

        Raises Permanent if it is corrupted.
        """
        folder = self.folder(kind, key)
        if not (folder / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(folder)
        except ValueError:
            raise corrupted(folder, f"{MANIFEST} is malformed") from None
        verify(folder, manifest, intact=self._intact)
        return Artifact(folder, manifest)

    def commit(self, kind: str, key: str, **facts: Any) -> Artifact:
        """Hashes every file, writes the manifest, then deletes the scratch folder, which a restart
        needs until the manifest exists. Raises Temporary if the lock is lost."""
        folder = self.folder(kind, key)
        files = {
            str(path.relative_to(folder)): describe(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and path.name != MANIFEST
            and path.relative_to(folder).parts[0] != SCRATCH
        }
        manifest = Manifest(kind=kind, key=key, files=files, **storable(facts))
        self.check_lock()
        write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1))
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        return Artifact(folder, manifest)

    @contextmanager
    def exclusive(
        self, wait: float = 0, notice: Callable[[str], None] = lambda line: None
    ) -> Iterator[None]:
        """Locks the storage folder, because recipes share its artifacts. Waits up to `wait` seconds
        for another run, after passing a line to `notice`. Interrupts the run if it loses the
        lock."""
        if not wait >= 0:
            raise Permanent(f"--wait {wait:g}: not a time; write 0 or more seconds")
        job, attempt = (os.environ.get(v, "") for v in (JOB_VARIABLE, ATTEMPT_VARIABLE))
        what = f"storage folder {self.storage}"
        lease = Lease(self.root / LEASE, what, job=job, attempt=attempt)
        with ExitStack() as stack:
            try:
                interrupt = stack.enter_context(interruptible())
                stack.enter_context(lease.held(wait, notice, interrupt))
            except OSError as error:
                raise Permanent(
                    f"cannot lock storage folder {self.storage} ({error.strerror}); correct it, or "
                    "choose another with --set storage=FOLDER"
                ) from None
            self._lease = lease
            try:
                yield
            except KeyboardInterrupt:
                if lease.lost:
                    lease.check()
                raise
            finally:
                self._lease = None

    def check_lock(self) -> None:
        """Raises Temporary if another run took over the lock that this one holds."""
        if self._lease:
            self._lease.check()


def write_rows(folder: Path, rows: Iterable[dict[str, Any]], name: str = ROWS) -> int:
    """Writes a JSONL file and returns the number of its rows."""
    count = 0
    # A lone surrogate, which JSON can hold but UTF-8 cannot, becomes a question mark.
    with (folder / name).open("w", encoding="utf-8", errors="replace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
