"""Creates logged models in MLflow."""

import re
from typing import TYPE_CHECKING

from zephyr_ray.store import Artifact
from zephyr_ray.tracking.experiment import Experiment
from zephyr_ray.tracking.values import to_params

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

KEY = "zephyr.key"
"""Tag that holds the artifact key of a run or model."""


def create_model(
    experiment: Experiment, run_id: str, name: str, artifact: Artifact
) -> "LoggedModel":
    """Creates the logged model of a stage's run: the location of its weights, not a copy.

    Reimplements `mlflow.create_external_model`, which would use the global tracking URI.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    client = experiment.client
    model = client.create_logged_model(
        experiment.id,
        name=re.sub(r"[^\w-]", "_", name),
        source_run_id=run_id,
        tags={
            "mlflow.model.isExternal": "true",
            KEY: artifact.key,
            "zephyr.weights": str(artifact.model_folder),
        },
        params=to_params(artifact.manifest.settings),
        model_type=artifact.manifest.kind,
    )
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model
