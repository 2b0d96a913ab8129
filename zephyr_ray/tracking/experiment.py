"""Opens the MLflow experiment of a recipe, and finds runs and models in it."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.tracking.values import batches, reason, to_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

log = logging.getLogger("zephyr_ray")

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's 7 retries of 120 s would block the pipeline if the server is down.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""MLflow's tag for the kind of an experiment, and the kind that trains models: its page shows runs
and models instead of traces."""


class Experiment:
    """An MLflow experiment and the client that reaches it."""

    def __init__(self, client: "MlflowClient", experiment_id: str):
        self.client, self.id = client, experiment_id
        self._warned = False

    @classmethod
    def open(cls, storage: Path, name: str) -> "Experiment":
        """Finds or creates the experiment."""
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or _database(storage)
        client = _connect(uri)
        return cls(client, _find_or_create(client, uri, storage, name))

    def find_run(self, tags: dict[str, str], *conditions: str) -> str | None:
        query = _query(tags, *conditions)
        runs = self.client.search_runs([self.id], query, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def find_model(self, tags: dict[str, str], *conditions: str) -> "LoggedModel | None":
        """Returns the newest logged model with these tags."""
        models = self.client.search_logged_models(
            [self.id], _query(tags, *conditions), max_results=1
        )
        return models[0] if models else None

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Logs new parameters; a resumed run keeps its old ones, as MLflow refuses to change
        them."""
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        new = [Param(k, v) for k, v in to_params(params).items() if k not in known]
        for batch in batches(new):
            self.client.log_batch(run_id, params=batch)

    @contextmanager
    def suppress_errors(self) -> Iterator[None]:
        """Suppresses exceptions; logs the first one of this pipeline as a warning."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                log.warning("MLflow: %s; the pipeline continues without MLflow", reason(error))
            self._warned = True


@contextmanager
def readable_errors(storage: Path) -> Iterator[None]:
    """Converts an MLflow error to one line: Temporary if a server may soon answer, else
    Permanent."""
    server = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        yield
    except Exception as error:  # database drivers and servers raise different classes
        why, fix = reason(error), f"repair or move away {storage.absolute()}/mlflow.db"
        if server:
            fix = "check MLFLOW_TRACKING_URI"
        elif re.search("is locked|disk I/O", why):  # a storage without file locks
            fix = "set MLFLOW_TRACKING_URI to a server or to a file on a local disk"
        uri = server or _database(storage)
        kind = Temporary if server and _is_outage(error) else Permanent
        raise kind(f"cannot use MLflow at {uri}: {why}; {fix}") from None


def _is_outage(error: BaseException | None) -> bool:
    """Returns whether a server could not be reached, or had an error of its own (status 5xx)."""
    from requests.exceptions import ConnectionError, RetryError, Timeout

    if error is None:
        return False
    is_own = re.search(r"failed with error code 5\d\d", str(error)) is not None
    cause = error.__cause__ or error.__context__
    return is_own or isinstance(error, ConnectionError | RetryError | Timeout) or _is_outage(cause)


def _database(storage: Path) -> str:
    return f"sqlite:///{storage.absolute()}/mlflow.db"


def _connect(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    if "sql" in uri.partition("://")[0]:
        # Fail fast: MLflow would retry for 100 seconds if the database does not answer.
        from sqlalchemy import create_engine, inspect

        engine = create_engine(uri)
        inspect(engine).get_table_names()
        engine.dispose()
    return MlflowClient(uri)


def _find_or_create(client: "MlflowClient", uri: str, storage: Path, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server stores artifacts itself; with a database they go to the storage folder.
        served = uri.startswith("http")
        location = None if served else (storage.absolute() / "mlartifacts").as_uri()
        tags = {KIND_TAG: KIND}
        return str(client.create_experiment(name, artifact_location=location, tags=tags))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    # Keeps a kind that a person chose; MLflow's UI writes kinds that it inferred.
    chosen = experiment.tags.get(KIND_TAG)
    if not chosen or "inferred" in chosen:
        client.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)
    return str(experiment.experiment_id)


def _query(tags: dict[str, str], *conditions: str) -> str:
    return " AND ".join([*(f"tags.`{k}` = '{v}'" for k, v in tags.items()), *conditions])
