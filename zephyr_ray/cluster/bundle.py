"""Packs a recipe and the files it reads into a ConfigMap."""

import base64
import os
import re
from pathlib import Path
from typing import Any

import yaml

from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import number
from zephyr_ray.recipe import Recipe
from zephyr_ray.settings import FILE, WEIGHTS, Strict, marked
from zephyr_ray.stage import original_name

FOLDER = "/etc/zephyr"
"""Mount path of the ConfigMap in the pods."""
RECIPE = "recipe.yaml"
CONFIG_MAP_BYTES = 1024**2
"""Maximum bytes per ConfigMap, set by Kubernetes."""


def bundle(raw: dict[str, Any], recipe: Recipe, storage: str, path: Path) -> dict[str, bytes]:
    """Returns the files of the ConfigMap by key. `raw` is the recipe after `extends` and --set;
    `storage` is the folder where the pods mount the shared claim.

    Absolute paths name files on the cluster and are kept; relative files are included. Raises
    Permanent if a file cannot be read or is a folder, weights are a folder on this machine, the
    storage is outside the mount, or the total exceeds CONFIG_MAP_BYTES.
    """
    raw = {**raw, "name": recipe.name, "storage": _storage(str(recipe.storage), storage, path)}
    names: dict[Path, str] = {}
    sweep = dict(raw.get("sweep") or {})
    models: dict[str, Strict] = {
        n: model.settings for n, model in recipe.models.items() if n not in recipe.stages
    }
    stages: dict[str, Strict] = {**recipe.stages}
    for section, named in (("models", models), ("stages", stages)):
        settings = {n: dict(s) for n, s in (raw.get(section) or {}).items()}
        for name, spec in named.items():
            original = original_name(name, recipe.variants)
            for field, _, values in marked(spec, FILE):
                key = f"{original}.{field}"
                if key in sweep:
                    sweep[key] = _in_pods(recipe, raw["sweep"][key], names)
                elif values:
                    settings[original][field] = _in_pods(recipe, getattr(spec, field), names)
        raw[section] = settings
    if sweep:
        raw["sweep"] = sweep
    for name, model in models.items():
        for weights in [v for _, _, values in marked(model, WEIGHTS) for v in values]:
            if not Path(weights).is_absolute() and recipe.file(weights).is_dir():
                raise Permanent(
                    f"{path}: model '{name}': weights '{weights}' is a folder on this machine; "
                    "copy it to the cluster's storage and give its absolute path there"
                )
    files = {RECIPE: yaml.safe_dump(raw, sort_keys=False, allow_unicode=True).encode()}
    for file, name in names.items():
        if file.is_dir():
            raise Permanent(
                f"{path}: {file} is a folder, which a ConfigMap cannot hold; copy it to the "
                "cluster's storage and give its absolute path there"
            )
        try:
            files[name] = file.read_bytes()
        except OSError as error:
            raise Permanent(f"cannot read {file}: {error.strerror}; check the path") from None
    size = sum(len(name) + len(content) for name, content in files.items())
    if size > CONFIG_MAP_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise Permanent(
            f"{path}: recipe and files are {number(size / CONFIG_MAP_BYTES, 1)} MiB, a ConfigMap "
            f"holds 1; copy {largest.partition('-')[2] or largest} to the cluster's storage and "
            "give its absolute path there"
        )
    return files


def config_map(
    name: str, files: dict[str, bytes], owner: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns an immutable ConfigMap that is deleted with its owner. Content that is not UTF-8 goes
    into `binaryData`."""
    data: dict[str, str] = {}
    binary: dict[str, str] = {}
    for file, content in files.items():
        try:
            data[file] = content.decode()
        except UnicodeDecodeError:
            binary[file] = base64.b64encode(content).decode()
    metadata: dict[str, Any] = {"name": name}
    if owner:
        reference = {key: owner[key] for key in ("apiVersion", "kind")}
        reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
        metadata["ownerReferences"] = [reference]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "data": data,
        "binaryData": binary,
    }


def _in_pods(recipe: Recipe, value: Any, names: dict[Path, str]) -> Any:
    """Returns the path, or list of paths, to write into the packed recipe; adds relative files to
    `names`."""
    if isinstance(value, list):
        return [_in_pods(recipe, path, names) for path in value]
    if value is None or Path(value).is_absolute():
        return value
    file = recipe.file(value)
    # The number keeps equal names from two folders apart: ConfigMap keys have no folders.
    clean = re.sub(r"[^-._a-zA-Z0-9]", "_", file.name)[:200]
    return names.setdefault(file, f"{len(names)}-{clean}")


def _storage(folder: str, storage: str, path: Path) -> str:
    """Returns the recipe's storage as the pods see it. Raises Permanent if it is outside
    the mount."""
    place = os.path.normpath(Path(storage) / folder)
    if not Path(place).is_relative_to(storage):
        raise Permanent(
            f"{path}: storage {folder} is not on the cluster's storage; use a folder below "
            f"{storage}, where the profile mounts it"
        )
    return place
