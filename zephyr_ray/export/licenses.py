"""Finds the license that a source states in its card, its LICENSE file or its configuration."""

import json
import re
from pathlib import Path
from typing import Any

from zephyr_ray.digests import known_digest
from zephyr_ray.models.packaged import PACKAGED
from zephyr_ray.models.weights import HUB_ID, find_local

UNKNOWN = "unknown"
OWN = "apache-2.0"
"""The license of the seed files that this package contains."""
TEXTS = {"Apache License": "apache-2.0", "MIT License": "mit"}
"""Identifiers of licenses by the first words of their texts."""
OTHER = "other"
"""Identifier if a LICENSE file starts with none of `TEXTS`."""


def license_of_model(weights: str) -> str:
    """Returns the license of a packaged model, a folder or a model on the hub."""
    if weights in PACKAGED:
        return PACKAGED[weights].license
    folder = find_local(weights)
    stated = license_of_folder(folder) if folder else UNKNOWN
    return _on_hub(weights, "model") if stated == UNKNOWN else stated


def license_of_dataset(name: str) -> str:
    """Returns the license of a data set on the hub; UNKNOWN if the name is not a hub id."""
    return _on_hub(name, "dataset")


def license_of_folder(folder: Path) -> str:
    """Returns the license that the files of a folder state."""
    card = _read(folder / "README.md")
    if front_matter := re.match(r"---\n(.*?)\n---\n", card, re.DOTALL):
        stated = re.search(r"^license:\s*['\"]?([\w.-]+)", front_matter[1], re.MULTILINE)
        if stated:
            return stated[1].lower()
    for path in sorted(folder.glob("LICENSE*")):
        text = _read(path).lstrip()
        return next((name for words, name in TEXTS.items() if text.startswith(words)), OTHER)
    try:
        stated_license = json.loads(_read(folder / "config.json")).get("license")
    except (ValueError, AttributeError):
        return UNKNOWN
    return stated_license if isinstance(stated_license, str) else UNKNOWN


def license_of_file(digest: Any, shipped: Path) -> str:
    """Returns the license of the file with this SHA-256: OWN if a JSONL file in `shipped`, the
    package's folder of recipes and seed files, has it, else UNKNOWN."""
    files = shipped.rglob("*.jsonl")
    return OWN if any(known_digest(path) == digest for path in files) else UNKNOWN


def _on_hub(name: str, what: str) -> str:
    from huggingface_hub import HfApi

    if not HUB_ID.fullmatch(name):
        return UNKNOWN
    try:
        card = HfApi().repo_info(name, repo_type=what, timeout=5).card_data
        stated = card.get("license") if card else None
    except Exception:  # no network, no such repository, offline mode, …
        return UNKNOWN
    return stated if isinstance(stated, str) else UNKNOWN


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
