"""The parent run of a pipeline in MLflow."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.store import Artifact
from zephyr_ray.tracking.experiment import Experiment, readable_errors
from zephyr_ray.tracking.logged_models import KEY
from zephyr_ray.tracking.stage_run import Parent, StageRun

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Tracking:
    """The parent run of one pipeline; only `open` raises."""

    def __init__(self, experiment: Experiment, run_id: str):
        self.experiment, self.run_id = experiment, run_id
        self._parent = Parent(experiment, run_id)

    @classmethod
    def open(
        cls, storage: Path, recipe_name: str, recipe_key: str, params: dict[str, Any]
    ) -> "Tracking":
        """Resumes or creates the parent run of this recipe key. Raises Permanent if it cannot."""
        with readable_errors(storage):
            experiment = Experiment.open(storage, recipe_name)
            client, tags = experiment.client, {"zephyr.recipe_key": recipe_key}
            run_id = experiment.find_run(tags)
            if run_id is None:
                run = client.create_run(experiment.id, tags=tags, run_name=recipe_name)
                run_id = run.info.run_id
            client.update_run(run_id, status="RUNNING")
            experiment.log_params(run_id, params)
            return cls(experiment, run_id)

    @property
    def client(self) -> "MlflowClient":
        return self.experiment.client

    @property
    def page(self) -> str:
        """Path of the experiment in MLflow's UI. Sets `workflowType`, because MLflow 3.17 otherwise
        shows traces instead of runs, whatever the experiment's kind."""
        return f"/#/experiments/{self.experiment.id}/runs?workflowType=machine_learning"

    def start_stage(
        self,
        name: str,
        kind: str,
        key: str,
        params: dict[str, Any],
        reads: Collection[str] = (),
    ) -> StageRun:
        """Resumes or creates the nested run of this stage key; `reads` names the stages whose
        artifacts the stage reads."""
        return StageRun(self._parent, name, kind, key, params, reads)

    def record_cached(self, name: str, artifact: Artifact) -> None:
        """Records that the stage was reused, and completes a nested run that was left open by a
        process killed after the commit."""
        self._parent.artifacts[name] = artifact
        with self.suppress_errors():
            self.client.set_tag(self.run_id, f"zephyr.cached.{name}", artifact.key)
            tags = {KEY: artifact.key, "mlflow.parentRunId": self.run_id}
            if self.experiment.find_run(tags, "attributes.status != 'FINISHED'"):
                StageRun.record(self._parent, name, artifact)

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the parent run with FINISHED, FAILED or KILLED."""
        with self.suppress_errors():
            self.client.set_terminated(self.run_id, status)

    def suppress_errors(self) -> AbstractContextManager[None]:
        return self.experiment.suppress_errors()
