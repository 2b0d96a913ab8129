"""Writes a model's folder with its weights in another precision, one shard in memory at a time."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zephyr_ray.models.headers import count_parameters

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SHARD_BYTES = 2 * 10**9
"""Maximum bytes per file, unless one tensor has more."""
INDEX = "model.safetensors.index.json"


def write_model(source: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Writes the weights in one of DTYPES and copies the model's other files; returns what the
    card's front matter states about the model."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copy(path, folder)
    _write_weights(source, folder, DTYPES[dtype])
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the name in earlier versions of transformers
    config["dtype"] = DTYPES[dtype]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")
    return {"library_name": "transformers", "pipeline_tag": "text-generation"}


def _write_weights(source: Path, folder: Path, dtype: str) -> None:
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    parts: list[Path] = []
    for tensors in _shards(source, dtype):
        parts.append(folder / f"part-{len(parts)}")
        save_file(tensors, parts[-1], metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, parts[-1].name)
        tensors.clear()  # before the next shard is read
    if len(parts) == 1:
        parts[0].rename(folder / "model.safetensors")
        return
    names = {
        part.name: f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for number, part in enumerate(parts, 1)
    }
    for part in parts:
        part.rename(folder / names[part.name])
    size = sum((folder / name).stat().st_size for name in names.values())
    index = {
        "metadata": {"total_size": size, "total_parameters": count_parameters(folder)},
        "weight_map": {tensor: names[part] for tensor, part in places.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(source: Path, dtype: str) -> Iterator[dict[str, Any]]:
    """Yields shards: tensors by name, converted if they are floating-point numbers."""
    import torch
    from safetensors import safe_open

    shard: dict[str, Any] = {}
    size = 0
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(getattr(torch, dtype))
                if shard and size + tensor.nbytes > SHARD_BYTES:
                    yield shard
                    shard, size = {}, 0
                shard[name] = tensor
                size += tensor.nbytes
    yield shard
