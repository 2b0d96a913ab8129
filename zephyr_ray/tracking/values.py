"""Converts names and values to what MLflow accepts, without secrets."""

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zephyr_ray.masking import masked

if TYPE_CHECKING:
    from mlflow.entities import Metric

PARAM_LENGTH, TAG_LENGTH, NAME_LENGTH, BATCH = 6000, 5000, 250, 100
"""Maximum characters per parameter, tag and name, and maximum entries per request, as in
mlflow.utils.validation; older servers allow 5,000 characters per tag."""


def to_params(values: dict[str, Any]) -> dict[str, str]:
    return {to_name(k): masked(v)[:PARAM_LENGTH] for k, v in values.items()}


def to_metrics(
    values: dict[str, Any],
    step: int,
    model_id: str | None = None,
    dataset: tuple[str, str] | tuple[None, None] = (None, None),
) -> "list[Metric]":
    """Returns the numbers among the values as metrics of one step, optionally with the logged model
    that they belong to and the data set (name, digest) that they were measured on."""
    from mlflow.entities import Metric

    now, (name, digest) = int(time.time() * 1000), dataset
    return [
        Metric(to_name(key), float(value), now, step, model_id, name, digest)
        for key, value in values.items()
        if isinstance(value, int | float)
    ]


def batches(items: list[Any]) -> Iterator[list[Any]]:
    yield from (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def to_name(name: str) -> str:
    """Returns a name that MLflow accepts: letters, digits, `_-. :/`, no empty or dotted parts."""
    parts = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", str(name)).split("/")
    return "/".join(p for p in parts if p.strip(". "))[:NAME_LENGTH] or "_"


def reason(error: Exception) -> str:
    """Returns the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {masked(lines[0])[:200]}"
