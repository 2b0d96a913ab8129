"""Defines the manifest of an artifact: its inputs, counts and times, and hashes of its files."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from zephyr_ray.messages import encodable

MANIFEST = "manifest.json"


class File(BaseModel):
    """Size and hash of one file."""

    bytes: int
    sha256: str
    mtime_ns: int | None = None
    """Time of its last change in nanoseconds since 1970; None in manifests of earlier versions."""


class Manifest(BaseModel):
    """The inputs, counts and files of an artifact. It is written last, so its presence means that
    the artifact is complete. Unknown fields are ignored, because stores hold manifests of other
    versions."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    kind: str
    key: str
    files: dict[str, File]
    """Files by path below the artifact's folder."""
    identity: dict[str, Any] | None = None
    """Inputs that the key hashes, kept so that a later plan can tell which of them changed."""
    name: str = ""
    """The stage in the recipe that made it."""
    recipe: str = ""
    settings: dict[str, Any] = {}
    reads: dict[str, str] = {}
    """Keys of the artifacts that it was made from, by stage."""
    models: dict[str, dict[str, Any]] = {}
    """Settings of the models that the stage read, with their weights located."""
    counts: dict[str, int | float] = {}
    """Numbers such as rows, truncated answers and dropped rows by rule."""
    examples: dict[str, list[Any]] = {}
    """A few examples per count."""
    seconds: float = 0
    """Wall time over all attempts."""
    attempts: int = 1
    created: str = ""
    """Time of completion, ISO 8601, UTC."""
    zephyr_ray: str = ""
    """The version of this package that made it."""

    def figures_of(self, model: str) -> dict[str, int | float]:
        """Returns the figures that the stage measured of a model, from the counts named
        <figure>/<model>. Counts with examples, such as shortened prompts, are numbers of rows
        and are omitted."""
        return {
            name.removesuffix(f"/{model}"): value
            for name, value in self.counts.items()
            if name.endswith(f"/{model}") and name not in self.examples
        }


def storable(value: Any) -> Any:
    """Returns a JSON value with encodable texts. Examples of dropped rows come straight from the
    data, whose ids may hold a lone surrogate."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {storable(name): storable(inner) for name, inner in value.items()}
    return [storable(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of an artifact. Raises ValueError if it cannot be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"cannot read {folder / MANIFEST}") from error
