"""The manifest of an artifact: what it was made from, what happened, and hashes of its files."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST = "manifest.json"


class File(BaseModel):
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """Written last, so that its presence means that the artifact is complete. Fields that this
    version does not know are ignored: stores hold manifests of other versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: str
    key: str
    files: dict[str, File]
    """By path below the artifact's folder."""
    identity: dict[str, Any] | None = None
    """What the key hashes, so that a later plan can say what changed."""
    name: str = ""
    """The stage in the recipe that made it."""
    recipe: str = ""
    settings: dict[str, Any] = {}
    reads: dict[str, str] = {}
    """Keys of the artifacts it was made from, by stage."""
    models: dict[str, dict[str, Any]] = {}
    """Settings of the models that it trained, asked or had judge, with their weights located."""
    counts: dict[str, int | float] = {}
    examples: dict[str, list[Any]] = {}
    seconds: float = 0
    """Wall time over all attempts."""
    attempts: int = 1
    created: str = ""
    """ISO 8601, UTC."""
    zephyr_ray: str = ""
    """The version that made it."""


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of an artifact. Raises ValueError if it cannot be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read") from error
