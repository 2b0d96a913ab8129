"""The nested run of one stage in MLflow: its inputs, metrics, files and model."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zephyr_ray.manifest import MANIFEST
from zephyr_ray.masking import masked
from zephyr_ray.store import ROWS, Artifact
from zephyr_ray.tracking.data_sets import to_input
from zephyr_ray.tracking.experiment import Experiment
from zephyr_ray.tracking.logged_models import KEY, create_model
from zephyr_ray.tracking.values import TAG_LENGTH, batches, to_metrics

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric

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


@dataclass
class Parent:
    """The parent run, and what its stages have made so far."""

    experiment: Experiment
    run_id: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """Artifacts by stage."""


class StageRun:
    """The nested run of one stage; its methods never raise."""

    def __init__(
        self,
        parent: Parent,
        name: str,
        kind: str,
        key: str,
        params: dict[str, Any],
        reads: Collection[str],
    ):
        self._parent = parent
        self._experiment, self._client = parent.experiment, parent.experiment.client
        self._name, self._kind, self._key = name, kind, key
        self._params, self._reads = params, reads
        self._run_id: str | None = None
        self._buffer: list[Metric] = []
        self._flush_after = 0.0  # time of the last flush, or when to retry a failed one
        self._step = 0
        with self._experiment.suppress_errors():
            self._client.update_run(self.run_id, status="RUNNING")
        with self._experiment.suppress_errors():
            self._log_inputs()

    @classmethod
    def record(cls, parent: Parent, name: str, artifact: Artifact) -> None:
        """Records a stage that finished earlier."""
        manifest = artifact.manifest
        reads = [n for n, made in parent.artifacts.items() if manifest.reads.get(n) == made.key]
        cls(parent, name, manifest.kind, artifact.key, manifest.settings, reads).finish(artifact)

    @property
    def run_id(self) -> str:
        """ID of the MLflow run, found or created on first use."""
        if self._run_id is None:
            tags = {KEY: self._key, "mlflow.parentRunId": self._parent.run_id}
            run_id = self._experiment.find_run(tags)
            if run_id is None:
                tags |= {"zephyr.kind": self._kind, "zephyr.stage": self._name}
                run = self._client.create_run(self._experiment.id, tags=tags, run_name=self._name)
                run_id = run.info.run_id
            self._run_id = run_id
            self._experiment.log_params(run_id, {"kind": self._kind, **self._params})
        return self._run_id

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Buffers the metrics of one step; sends them every two seconds or 100 metrics."""
        self._buffer += to_metrics(metrics, step)
        self._step = max(self._step, step)
        overdue = time.monotonic() - self._flush_after
        if overdue > FLUSH_SECONDS or (overdue > 0 and len(self._buffer) >= FLUSH_ENTRIES):
            self._flush()

    def finish(self, artifact: Artifact) -> None:
        """Logs what the stage made and ends the run; calling it again is harmless."""
        self._parent.artifacts[self._name] = artifact
        self._flush()
        with self._experiment.suppress_errors():
            self._log_counts(artifact)
            self._log_files(artifact)
        with self._experiment.suppress_errors():
            self._log_figures_of_models(artifact)
        with self._experiment.suppress_errors():
            self._client.set_terminated(self.run_id, "FINISHED")

    def fail(self, message: str) -> None:
        self._flush()
        with self._experiment.suppress_errors():
            self._client.set_tag(self.run_id, "zephyr.error", masked(message)[:TAG_LENGTH])
            self._client.set_terminated(self.run_id, "FAILED")

    def _flush(self) -> None:
        self._flush_after = time.monotonic() + RETRY_SECONDS
        with self._experiment.suppress_errors():
            for batch in batches(self._buffer):
                self._client.log_batch(self.run_id, metrics=batch)
                self._buffer = self._buffer[len(batch) :]
            self._flush_after = time.monotonic()

    def _log_inputs(self) -> None:
        """Logs the data sets and models that the stage reads."""
        from mlflow.entities import LoggedModelInput

        read = {name: self._parent.artifacts[name] for name in self._reads}
        data = [
            to_input(name, artifact, self._role(name))
            for name, artifact in read.items()
            if (artifact.folder / ROWS).is_file()
        ]
        models = [
            LoggedModelInput(self._model(name).model_id)
            for name, artifact in read.items()
            if artifact.model_folder.is_dir()
        ]
        if data or models:
            self._client.log_inputs(self.run_id, data, models)

    def _role(self, read: str) -> str:
        """Returns the settings that name a stage, such as `data` or `validation`."""
        names = {k: v if isinstance(v, list) else [v] for k, v in self._params.items()}
        return ", ".join(setting for setting, values in names.items() if read in values)

    def _log_counts(self, artifact: Artifact) -> None:
        manifest = artifact.manifest
        metrics = manifest.counts | ({"seconds": manifest.seconds} if manifest.seconds else {})
        model = self._own_model(artifact) if artifact.model_folder.is_dir() else None
        for batch in batches(to_metrics(metrics, self._step, model and model.model_id)):
            self._client.log_batch(self.run_id, metrics=batch)

    def _log_files(self, artifact: Artifact) -> None:
        folder, text = artifact.folder, masked(artifact.manifest.model_dump_json(indent=1))
        self._client.log_text(self.run_id, text, MANIFEST)
        for path in (folder / name for name in ARTIFACTS):
            if path.is_file():
                self._client.log_artifact(self.run_id, str(path))
        if (folder / "report.html").is_file():
            self._client.log_artifact(self._parent.run_id, str(folder / "report.html"))
        if (folder / ROWS).is_file():
            with (folder / ROWS).open(encoding="utf-8") as file:
                first = "".join(line for line, _ in zip(file, range(SAMPLES), strict=False))
            self._client.log_text(self.run_id, first, "samples.jsonl")

    def _log_figures_of_models(self, artifact: Artifact) -> None:
        """Logs figures that the stage measured for this pipeline's models as metrics of the models
        and of the runs that trained them, so that MLflow can sort both by them."""
        artifacts = self._parent.artifacts
        models = [n for n, a in artifacts.items() if n != self._name and a.model_folder.is_dir()]
        data_set = self._name, artifact.key
        for name in models:
            if not (figures := artifact.manifest.figures_of(name)):
                continue
            model = self._model(name)
            named = {f"{self._name}/{figure}": value for figure, value in figures.items()}
            for batch in batches(to_metrics(named, 0, model.model_id, data_set)):
                self._client.log_batch(model.source_run_id, metrics=batch)

    def _own_model(self, artifact: Artifact) -> "LoggedModel":
        of_this_run = f"source_run_id = '{self.run_id}'"
        return self._experiment.find_model({KEY: artifact.key}, of_this_run) or create_model(
            self._experiment, self.run_id, self._name, artifact
        )

    def _model(self, name: str) -> "LoggedModel":
        """Returns the logged model of another stage. If a run of another recipe trained it, records
        it in this experiment first."""
        artifact = self._parent.artifacts[name]
        if self._experiment.find_model({KEY: artifact.key}) is None:
            StageRun.record(self._parent, name, artifact)
        model = self._experiment.find_model({KEY: artifact.key})
        if model is None:
            raise RuntimeError(f"the model '{name}' could not be recorded")
        return model
