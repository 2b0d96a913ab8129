"""Logs to MLflow, from the driver only: one parent run per pipeline, one nested run per stage.

MLFLOW_TRACKING_URI names the server; the default is SQLite in `<storage>/mlflow.db` with artifacts
in `<storage>/mlartifacts`. A pipeline starts only if MLflow can be opened. Later failures never
stop it: the first one logs a warning, and metrics are kept until the next flush.
"""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import MANIFEST, Manifest
from zephyr_ray.masking import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger("zephyr_ray")

ARTIFACTS = ("metrics.jsonl", "report.html", "mask.html")
"""Files of a stage's artifact that are logged, if they exist."""
SAMPLES = 20
"""Rows of a stage's artifact that are logged as samples.jsonl."""
FLUSH_SECONDS = 2.0
"""Maximum seconds between two flushes while a stage logs metrics."""
FLUSH_ENTRIES = 100
"""Number of buffered metrics that triggers an earlier flush."""
RETRY_SECONDS = 30.0
"""Minimum seconds between a failed flush and the next."""
PARAM_LENGTH, TAG_LENGTH, NAME_LENGTH, BATCH = 6000, 5000, 250, 100
"""Maximum characters per parameter, tag and name, and maximum entries per request, as in
mlflow.utils.validation; older servers allow 5,000 characters per tag."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's 7 retries of 120 s would block the pipeline if the server is down.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Tracking:
    """The parent run of one pipeline; only `open` raises."""

    def __init__(self, client: "MlflowClient", experiment_id: str, run_id: str):
        self.client, self.experiment_id, self.run_id = client, experiment_id, run_id
        self._warned = False

    @classmethod
    def open(
        cls, storage: Path, recipe_name: str, recipe_key: str, params: dict[str, Any]
    ) -> "Tracking":
        """Resumes or creates the parent run of this recipe key. Raises Permanent if it cannot."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        uri = server or f"sqlite:///{storage.absolute()}/mlflow.db"
        try:
            client = _connect(uri)
            experiment_id = _experiment(client, uri, storage, recipe_name)
            tags = {"zephyr.recipe_key": recipe_key}
            run_id = _find_run(client, experiment_id, tags)
            if run_id is None:
                run = client.create_run(experiment_id, tags=tags, run_name=recipe_name)
                run_id = run.info.run_id
            client.update_run(run_id, status="RUNNING")
            _log_params(client, run_id, params)
        except Exception as error:  # database drivers and servers raise different classes
            reason, fix = _reason(error), f"repair or move away {storage.absolute()}/mlflow.db"
            if server:
                fix = "check MLFLOW_TRACKING_URI"
            elif re.search("is locked|disk I/O", reason):  # a storage without file locks
                fix = "set MLFLOW_TRACKING_URI to a server or to a file on a local disk"
            raise Permanent(f"cannot use MLflow at {uri}: {reason}; {fix}") from None
        return cls(client, experiment_id, run_id)

    def stage(self, name: str, kind: str, key: str, params: dict[str, Any]) -> "StageRun":
        """Resumes or creates the nested run of this stage key."""
        return StageRun(self, name, kind, key, params)

    def cached(
        self,
        name: str,
        key: str,
        manifest: Manifest | None = None,
        folder: Path | None = None,
    ) -> None:
        """Records that the stage was reused.

        If the artifact is given, also completes a nested run that a kill left open after the
        commit.
        """
        with self.suppress_errors():
            self.client.set_tag(self.run_id, f"zephyr.cached.{name}", key)
            tags = {"zephyr.key": key, "mlflow.parentRunId": self.run_id}
            unfinished = "attributes.status != 'FINISHED'"
            open_run = _find_run(self.client, self.experiment_id, tags, unfinished)
            if open_run and manifest and folder:
                self.stage(name, manifest.kind, key, {}).finish(manifest, folder)

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the parent run with FINISHED, FAILED or KILLED."""
        with self.suppress_errors():
            self.client.set_terminated(self.run_id, status)

    @contextmanager
    def suppress_errors(self) -> Iterator[None]:
        """Suppresses exceptions; logs the first one of this run as a warning."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                log.warning("MLflow: %s; the pipeline continues without MLflow", _reason(error))
            self._warned = True


class StageRun:
    """The nested run of one stage; its methods never raise."""

    def __init__(self, tracking: Tracking, name: str, kind: str, key: str, params: dict[str, Any]):
        self._tracking, self._client = tracking, tracking.client
        self._name, self._kind, self._key, self._params = name, kind, key, params
        self._run_id: str | None = None
        self._buffer: list[Metric] = []
        self._flush_after = 0.0  # time of the last flush, or when to retry a failed one
        self._step = 0
        with tracking.suppress_errors():
            self._client.update_run(self.run_id, status="RUNNING")

    @property
    def run_id(self) -> str:
        """ID of the MLflow run, found or created on first use."""
        if self._run_id is None:
            experiment_id = self._tracking.experiment_id
            tags = {"zephyr.key": self._key, "mlflow.parentRunId": self._tracking.run_id}
            run_id = _find_run(self._client, experiment_id, tags)
            if run_id is None:
                tags |= {"zephyr.kind": self._kind, "zephyr.stage": self._name}
                run = self._client.create_run(experiment_id, tags=tags, run_name=self._name)
                run_id = run.info.run_id
            self._run_id = run_id
            _log_params(self._client, run_id, {"kind": self._kind, **self._params})
        return self._run_id

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Buffers the metrics of one step; sends them every two seconds or 100 metrics."""
        self._buffer += _metrics(metrics, step)
        self._step = max(self._step, step)
        overdue = time.monotonic() - self._flush_after
        if overdue > FLUSH_SECONDS or (overdue > 0 and len(self._buffer) >= FLUSH_ENTRIES):
            self._flush()

    def finish(self, manifest: Manifest, folder: Path) -> None:
        """Logs the artifact's metrics and files and ends the run; calling it again is harmless."""
        self._flush()
        metrics = manifest.counts | ({"seconds": manifest.seconds} if manifest.seconds else {})
        with self._tracking.suppress_errors():
            has_model = (folder / "model").is_dir()
            model_id = self._logged_model_id(manifest, folder) if has_model else None
            for batch in _batches(_metrics(metrics, self._step, model_id)):
                self._client.log_batch(self.run_id, metrics=batch)
            self._client.log_text(self.run_id, masked(manifest.model_dump_json(indent=1)), MANIFEST)
            for path in (folder / name for name in ARTIFACTS):
                if path.is_file():
                    self._client.log_artifact(self.run_id, str(path))
            if (folder / "report.html").is_file():
                self._client.log_artifact(self._tracking.run_id, str(folder / "report.html"))
            if (folder / "rows.jsonl").is_file():
                with (folder / "rows.jsonl").open(encoding="utf-8") as file:
                    first = "".join(line for line, _ in zip(file, range(SAMPLES), strict=False))
                self._client.log_text(self.run_id, first, "samples.jsonl")
        with self._tracking.suppress_errors():
            self._client.set_terminated(self.run_id, "FINISHED")

    def fail(self, message: str) -> None:
        self._flush()
        with self._tracking.suppress_errors():
            self._client.set_tag(self.run_id, "zephyr.error", masked(message)[:TAG_LENGTH])
            self._client.set_terminated(self.run_id, "FAILED")

    def _flush(self) -> None:
        self._flush_after = time.monotonic() + RETRY_SECONDS
        with self._tracking.suppress_errors():
            for batch in _batches(self._buffer):
                self._client.log_batch(self.run_id, metrics=batch)
                self._buffer = self._buffer[len(batch) :]
            self._flush_after = time.monotonic()

    def _logged_model_id(self, manifest: Manifest, folder: Path) -> str:
        """Finds or creates this run's logged model: the location of its weights, not a copy.

        Reimplements `mlflow.create_external_model`, which would use the global tracking URI.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        models = self._client.search_logged_models(
            [self._tracking.experiment_id], f"source_run_id = '{self.run_id}'", max_results=1
        )
        if models:
            return str(models[0].model_id)
        model = self._client.create_logged_model(
            self._tracking.experiment_id,
            name=re.sub(r"[^\w-]", "_", self._name),
            source_run_id=self.run_id,
            tags={
                "mlflow.model.isExternal": "true",
                "zephyr.key": self._key,
                "zephyr.weights": str(folder / "model"),
            },
            params=_params(manifest.settings),
            model_type=self._kind,
        )
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        return str(model.model_id)


def _connect(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    if "sql" in uri.partition("://")[0]:
        # Fail fast: MLflow would retry for 100 seconds if the database does not answer.
        from sqlalchemy import create_engine, inspect

        engine = create_engine(uri)
        inspect(engine).get_table_names()
        engine.dispose()
    return MlflowClient(uri)


def _experiment(client: "MlflowClient", uri: str, storage: Path, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server stores artifacts itself; with a database they go to the storage folder.
        served = uri.startswith("http")
        location = None if served else (storage.absolute() / "mlartifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _find_run(
    client: "MlflowClient", experiment_id: str, tags: dict[str, str], *conditions: str
) -> str | None:
    query = " AND ".join([*(f"tags.`{k}` = '{v}'" for k, v in tags.items()), *conditions])
    runs = client.search_runs([experiment_id], query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _log_params(client: "MlflowClient", run_id: str, params: dict[str, Any]) -> None:
    """Logs new parameters; a resumed run keeps its old ones, as MLflow refuses to change them."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    new = [Param(k, v) for k, v in _params(params).items() if k not in known]
    for batch in _batches(new):
        client.log_batch(run_id, params=batch)


def _params(values: dict[str, Any]) -> dict[str, str]:
    """Returns names and values as MLflow accepts them, without secrets."""
    return {_name(k): masked(v)[:PARAM_LENGTH] for k, v in values.items()}


def _metrics(values: dict[str, Any], step: int, model_id: str | None = None) -> "list[Metric]":
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(_name(name), float(value), now, step, model_id=model_id)
        for name, value in values.items()
        if isinstance(value, int | float)
    ]


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    yield from (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def _name(name: str) -> str:
    """Returns a name that MLflow accepts: letters, digits, `_-. :/`, no empty or dotted parts."""
    parts = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", str(name)).split("/")
    return "/".join(p for p in parts if p.strip(". "))[:NAME_LENGTH] or "_"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {masked(lines[0])[:200]}"
