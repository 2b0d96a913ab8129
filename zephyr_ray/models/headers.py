"""Reads names and shapes of tensors from the headers of safetensors files, without their
weights."""

import json
import math
from pathlib import Path

from zephyr_ray.errors import Permanent


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Returns the tensors' shapes by name. Raises Permanent if a file is corrupted."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            try:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                shapes |= {n: t["shape"] for n, t in header.items() if n != "__metadata__"}
            except (ValueError, OverflowError, MemoryError, AttributeError, TypeError, KeyError):
                raise Permanent(
                    f"{path}: not a safetensors file, or truncated; copy it again"
                ) from None
    return shapes


def count_parameters(folder: Path) -> int:
    """Returns the number of parameters in all safetensors files of a folder."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())
