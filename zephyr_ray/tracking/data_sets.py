"""Describes the rows of an artifact to MLflow as a data set."""

import json
from typing import TYPE_CHECKING

from zephyr_ray.store import ROWS, Artifact

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

TYPES = {
    bool: "boolean",
    int: "long",
    float: "double",
    str: "string",
    list: "array",
    dict: "object",
}
"""MLflow's names for the types of JSON values."""


def to_input(name: str, artifact: Artifact, role: str) -> "DatasetInput":
    """Returns an artifact's rows as an input of the run that reads them. The digest is its key;
    `role` says what the run uses it for, or is empty."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data_set = Dataset(
        name,
        digest=artifact.key,
        source_type="local",
        source=json.dumps({"uri": str(artifact.folder)}),
        schema=json.dumps({"mlflow_colspec": _columns(artifact)}),
        profile=json.dumps({"num_rows": artifact.manifest.counts.get("rows")}),
    )
    return DatasetInput(data_set, [InputTag("mlflow.data.context", role)] if role else [])


def _columns(artifact: Artifact) -> list[dict[str, str | bool]]:
    """Returns the columns of the first row."""
    with (artifact.folder / ROWS).open(encoding="utf-8") as file:
        first = json.loads(file.readline() or "{}")
    return [
        {"name": name, "type": TYPES[type(value)], "required": False}
        for name, value in first.items()
        if value is not None
    ]
