"""Compares the files of an artifact with its manifest: in a plan, before use, and on request.

A plan reads a file only if its time differs from the manifest's or from what the node remembers.
Before use, each node reads a large file once, and again if its times change (`digests` remembers
it); small files are read each time. Open an artifact's file only through `Artifact.file` or
`weights.resolve`, which verify it.
"""

from collections.abc import Callable
from pathlib import Path

from zephyr_ray.digests import is_remembered, known_digest, read_digest, stamp
from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import File, Manifest, read_manifest


def describe(path: Path) -> File:
    """Returns the entry of a finished file for the manifest."""
    seen, sha256 = read_digest(path)
    return File(bytes=seen.size, sha256=sha256, mtime_ns=seen.mtime_ns)


def is_unchanged(path: Path, entry: File) -> bool:
    """Returns whether a file matches its entry; reads it only if its time differs from the entry's
    or from what this node remembers."""
    if is_remembered(path) or stamp(path).mtime_ns != entry.mtime_ns:
        return matches(path, entry)
    return True


def matches(path: Path, entry: File) -> bool:
    """Returns whether a file has the digest of its entry, as remembered or as read now."""
    return known_digest(path) == entry.sha256


def matches_when_read(path: Path, entry: File) -> bool:
    """Reads a file and returns whether it has the digest of its entry."""
    return read_digest(path)[1] == entry.sha256


def verify(
    folder: Path,
    manifest: Manifest,
    subpath: str = "",
    intact: Callable[[Path, File], bool] = matches,
) -> None:
    """Raises Permanent if a file of the artifact at or under `subpath` is missing, has another
    size, or fails `intact`."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not Path(name).is_relative_to(subpath):
            continue
        try:
            if stamp(path).size != entry.bytes or not intact(path, entry):
                raise corrupted(folder, f"{name} does not match the hash in its manifest")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise corrupted(folder, f"{name} is missing") from None
        except OSError as error:
            raise Permanent(
                f"cannot read {path} ({error.strerror}); correct the storage and run again"
            ) from None


def verify_folder(folder: Path) -> None:
    """Verifies a folder, such as a model's, if it is part of an artifact."""
    try:
        manifest = read_manifest(folder.parent)
    except ValueError:
        return
    if folder.parent.name == f"{manifest.kind}-{manifest.key}":
        verify(folder.parent, manifest, folder.name)


def corrupted(folder: Path, what: str) -> Permanent:
    return Permanent(
        f"artifact {folder.name} is corrupted: {what}; delete {folder} to make it again"
    )
