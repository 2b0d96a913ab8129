"""Tests MLflow tracking on real SQLite: parent and nested runs, resumes, data sets, models."""

import json
import logging
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_endpoint import GOOD, Answer, endpoint

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.manifest import Manifest
from zephyr_ray.store import Artifact, content_key
from zephyr_ray.tracking.pipeline_run import Tracking


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shares one database, because creating it takes seconds; each test has its own recipe."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


BARE = Manifest(kind="sft", key="k", files={})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    rows = "".join(json.dumps({"id": i}) + "\n" for i in range(25))
    (tmp_path / "rows.jsonl").write_text(rows)
    manifest = Manifest(
        kind="sft",
        key="k1",
        files={},
        settings={"epochs": 1, "model": "base"},
        counts={"rows": 25, "dropped/too long": 3, "loss": 1.5},
        seconds=12.5,
    )
    return Artifact(tmp_path, manifest)


def test_stage_run_is_nested_under_the_parent(storage: Path) -> None:
    tracking = Tracking.open(storage, "nested", "k0", {"seed": 0})
    stage = tracking.start_stage("sft", "sft", "k1", {"epochs": 2})
    run = tracking.client.get_run(stage.run_id)
    assert run.data.tags["mlflow.parentRunId"] == tracking.run_id
    assert run.data.params == {"kind": "sft", "epochs": "2"}
    assert run.info.status == "RUNNING"
    assert tracking.client.get_run(tracking.run_id).data.params == {"seed": "0"}


def test_resumed_pipeline_continues_its_runs(storage: Path) -> None:
    first = Tracking.open(storage, "resumed", "k0", {"actors": 1})
    stage = first.start_stage("sft", "sft", "k1", {})
    stage.fail("killed")
    first.finish("FAILED")
    # An operational setting may change between attempts; MLflow refuses to change a parameter.
    again = Tracking.open(storage, "resumed", "k0", {"actors": 4})
    assert again.run_id == first.run_id
    assert again.start_stage("sft", "sft", "k1", {}).run_id == stage.run_id
    assert len(again.client.search_runs([again.experiment.id])) == 2
    assert again.client.get_run(again.run_id).info.status == "RUNNING"
    assert again.client.get_run(stage.run_id).info.status == "RUNNING"


def test_another_recipe_key_is_another_run(storage: Path) -> None:
    first = Tracking.open(storage, "other", "k0", {})
    assert Tracking.open(storage, "other", "k1", {}).run_id != first.run_id


def test_step_metrics_and_params_are_in_one_run(storage: Path, tmp_path: Path) -> None:
    tracking = Tracking.open(storage, "steps", "k0", {})
    stage = tracking.start_stage("dpo", "dpo", "k1", {"beta": 0.1})
    for step in range(250):
        stage.log_metrics({"loss": 250 - step, "rewards/margins": step, "note": "text"}, step)
    stage.finish(Artifact(tmp_path, BARE))
    run = tracking.client.get_run(stage.run_id)
    history = tracking.client.get_metric_history(stage.run_id, "rewards/margins")
    assert [(m.step, m.value) for m in history] == [(i, i) for i in range(250)]
    assert run.data.params["beta"] == "0.1"
    assert run.data.metrics == {"loss": 1, "rewards/margins": 249}
    assert run.info.status == "FINISHED"


def test_metrics_are_sent_every_two_seconds_or_hundred_values(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that training steps do not wait for MLflow."""
    stage = Tracking.open(storage, "batches", "k0", {}).start_stage("dpo", "dpo", "k1", {})
    now, sent = 1000.0, []
    monkeypatch.setattr(
        "zephyr_ray.tracking.stage_run.time", SimpleNamespace(monotonic=lambda: now, time=time.time)
    )
    monkeypatch.setattr(
        stage._client, "log_batch", lambda run_id, metrics: sent.append(len(metrics))
    )
    stage.log_metrics({"loss": 1.0}, 0)
    assert sent == [1]  # the first at once
    for step in range(1, 91):
        now += 0.02
        stage.log_metrics({"loss": 1.0}, step)
    assert sent == [1]
    now += 0.3
    stage.log_metrics({"loss": 1.0}, 91)
    assert sent == [1, 91]
    for step in range(92, 192):
        now += 0.01
        stage.log_metrics({"loss": 1.0}, step)
    assert sent == [1, 91, 100]


def test_finished_stage_shows_counts_and_artifacts(storage: Path, artifact: Artifact) -> None:
    tracking = Tracking.open(storage, "artifacts", "k0", {})
    stage = tracking.start_stage("sft", "sft", "k1", {})
    stage.finish(artifact)
    stage.finish(artifact)
    client = tracking.client
    metrics = client.get_run(stage.run_id).data.metrics
    assert metrics == {"rows": 25, "dropped/too long": 3, "loss": 1.5, "seconds": 12.5}
    names = {a.path for a in client.list_artifacts(stage.run_id)}
    assert names == {"manifest.json", "metrics.jsonl", "samples.jsonl"}
    samples = Path(client.download_artifacts(stage.run_id, "samples.jsonl")).read_text()
    assert [json.loads(line)["id"] for line in samples.splitlines()] == list(range(20))
    assert (storage / "mlartifacts").is_dir()


def test_trained_model_is_a_logged_model_of_its_run(storage: Path, artifact: Artifact) -> None:
    tracking = Tracking.open(storage, "models", "k0", {})
    stage = tracking.start_stage("sft.full", "sft", "k1", {})
    stage.finish(artifact)
    stage.finish(artifact)
    [model] = tracking.client.search_logged_models([tracking.experiment.id])
    assert (model.name, model.source_run_id, model.status) == ("sft_full", stage.run_id, "READY")
    assert model.params == {"epochs": "1", "model": "base"}
    assert {m.key: m.value for m in model.metrics}["loss"] == 1.5
    assert model.tags["zephyr.weights"] == str(artifact.folder / "model")
    outputs = tracking.client.get_run(stage.run_id).outputs.model_outputs
    assert [o.model_id for o in outputs] == [model.model_id]
    assert not list(storage.rglob("*.safetensors"))


@pytest.fixture
def pairs(tmp_path: Path) -> Artifact:
    """Returns a data set of two rows."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [{"id": "a", "chosen": [{}], "score": 0.5, "meta": {}, "note": None}, {"id": "b"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = content_key({"some": "pairs"})
    return Artifact(folder, Manifest(kind="preferences", key=key, files={}, counts={"rows": 2}))


def test_data_set_is_an_input_of_the_run_that_reads_it(
    storage: Path, tmp_path: Path, pairs: Artifact
) -> None:
    tracking = Tracking.open(storage, "data", "k0", {})
    tracking.record_cached("pairs", pairs)
    params = {"model": "base", "data": "pairs", "validation": ["pairs"]}
    stage = tracking.start_stage("dpo", "dpo", "k1", params, reads=["pairs"])
    [read] = tracking.client.get_run(stage.run_id).inputs.dataset_inputs
    data = read.dataset
    assert (data.name, data.digest) == ("pairs", content_key({"some": "pairs"}))
    assert json.loads(data.source) == {"uri": str(pairs.folder)}
    assert json.loads(data.profile) == {"num_rows": 2}
    columns = json.loads(data.schema)["mlflow_colspec"]
    assert [(c["name"], c["type"]) for c in columns] == [
        *(("id", "string"), ("chosen", "array"), ("score", "double"), ("meta", "object"))
    ]
    assert [(t.key, t.value) for t in read.tags] == [("mlflow.data.context", "data, validation")]
    stage.finish(Artifact(tmp_path, BARE))
    assert len(tracking.client.get_run(stage.run_id).inputs.dataset_inputs) == 1


def test_model_is_an_input_of_the_run_that_reads_it(
    storage: Path, artifact: Artifact, tmp_path: Path
) -> None:
    tracking = Tracking.open(storage, "reads", "k0", {})
    trained = tracking.start_stage("sft", "sft", "k1", {})
    trained.finish(artifact)
    stage = tracking.start_stage("dpo", "dpo", "k2", {"model": "sft"}, reads=["sft"])
    [model] = tracking.client.search_logged_models([tracking.experiment.id])
    [read] = tracking.client.get_run(stage.run_id).inputs.model_inputs
    assert read.model_id == model.model_id and model.source_run_id == trained.run_id


def test_figures_of_models_are_metrics_of_the_models(
    storage: Path, artifact: Artifact, pairs: Artifact
) -> None:
    """The reused model was trained by a run of another recipe, so it is recorded first."""
    tracking = Tracking.open(storage, "figures", "k0", {})
    tracking.record_cached("sft", artifact)
    counts = {"dropped/long": 3, "win_rate/base": 0.5, "win_rate/sft": 0.745, "turn/1/sft": 7}
    judged = replace(pairs, manifest=pairs.manifest.model_copy(update={"counts": counts}))
    stage = tracking.start_stage("winrate", "pairwise", judged.key, {})
    stage.finish(judged)
    stage.finish(judged)
    client = tracking.client
    [model] = client.search_logged_models([tracking.experiment.id])
    measured = {m.key: (m.value, m.dataset_name, m.dataset_digest) for m in model.metrics}
    assert measured["winrate/win_rate"] == (0.745, "winrate", judged.key)
    assert measured["winrate/turn/1"] == (7, "winrate", judged.key)
    assert {name for name in measured if name.startswith("winrate")} == {
        *("winrate/win_rate", "winrate/turn/1")
    }
    trained = client.get_run(model.source_run_id)
    assert trained.data.tags["zephyr.stage"] == "sft" and trained.info.status == "FINISHED"
    assert trained.data.metrics["winrate/win_rate"] == 0.745
    assert client.get_run(stage.run_id).data.metrics == counts


def test_experiment_opens_on_its_runs_unless_a_person_chose_another_kind(storage: Path) -> None:
    tracking = Tracking.open(storage, "kind", "k0", {})
    client = tracking.client
    runs = f"/#/experiments/{tracking.experiment.id}/runs?workflowType=machine_learning"
    assert tracking.page == runs

    def kind_after(kind: str) -> str:
        """Returns the kind that an experiment of this kind has after a pipeline used it."""
        tags = {"mlflow.experimentKind": kind} if kind else {}
        client.create_experiment(f"kind {kind}", tags=tags)
        Tracking.open(storage, f"kind {kind}", "k0", {})
        return client.get_experiment_by_name(f"kind {kind}").tags["mlflow.experimentKind"]

    own = "custom_model_development"
    assert client.get_experiment_by_name("kind").tags["mlflow.experimentKind"] == own
    assert kind_after("") == own  # made by an earlier version
    assert kind_after("genai_development_inferred") == own
    assert kind_after("finetuning") == "finetuning"


def test_reused_stage_is_a_tag_of_the_parent(storage: Path, artifact: Artifact) -> None:
    tracking = Tracking.open(storage, "cached", "k0", {})
    tracking.record_cached("sft", artifact)
    assert tracking.client.get_run(tracking.run_id).data.tags["zephyr.cached.sft"] == "k1"
    assert len(tracking.client.search_runs([tracking.experiment.id])) == 1


def test_run_left_open_by_a_kill_is_completed_when_its_stage_is_reused(
    storage: Path, artifact: Artifact
) -> None:
    tracking = Tracking.open(storage, "late", "k0", {})
    stage = tracking.start_stage("sft", "sft", "k1", {})
    tracking.record_cached("sft", artifact)
    run = tracking.client.get_run(stage.run_id)
    assert (run.info.status, run.data.metrics["rows"]) == ("FINISHED", 25)


def test_names_and_values_beyond_the_limits_are_cut(storage: Path, tmp_path: Path) -> None:
    tracking = Tracking.open(storage, "limits", "k0", {"long": "x" * 7000, "a=b": 1})
    assert tracking.client.get_run(tracking.run_id).data.params == {"long": "x" * 6000, "a_b": "1"}
    stage = tracking.start_stage("s", "clean", "k1", {f"p{i}": i for i in range(150)})
    counts = {"dropped/„as an AI“": 2, "a//b": 1}
    stage.finish(Artifact(tmp_path, BARE.model_copy(update={"counts": counts})))
    run = tracking.client.get_run(stage.run_id)
    assert run.data.metrics == {"dropped/_as an AI_": 2, "a/b": 1}
    assert len(run.data.params) == 151


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skips MLflow's waits between attempts, and returns their seconds."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def test_unreachable_server_is_one_clear_line_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    with pytest.raises(
        Temporary, match=rf"MLflow at http://127.0.0.1:{port}: .*; check MLFLOW_TRACKING_URI$"
    ) as caught:
        Tracking.open(tmp_path, "away", "k0", {})
    assert sum(slept) < 5
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("slept")
@pytest.mark.parametrize(
    ("status", "kind"), [(500, Temporary), (503, Temporary), (401, Permanent), (404, Permanent)]
)
def test_a_run_is_tried_again_only_after_a_fault_of_the_mlflow_server(
    status: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(lambda number, body: GOOD) as server:
        server.models = Answer(status, "no")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        with pytest.raises(kind, match="cannot use MLflow at .*; check MLFLOW_TRACKING_URI$"):
            Tracking.open(tmp_path, "away", "k0", {})


@pytest.mark.parametrize("name", ["a#b", "a b", "a+b&c=d", "é中"])
def test_the_database_is_in_the_storage_whatever_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    Tracking.open(tmp_path / name, "demo", "key", {}).finish()
    assert (tmp_path / name / "mlflow.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_damaged_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, but long enough to be read" * 99)
    with pytest.raises(
        Permanent, match="cannot use .*not a database.*; repair or move away .*/mlflow.db$"
    ):
        Tracking.open(tmp_path, "damaged", "k0", {})


def test_database_that_cannot_be_opened_is_one_clear_line_soon(
    tmp_path: Path, slept: list[float]
) -> None:
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(
        Permanent, match="cannot use .*unable to open.*; repair or move away .*/mlflow.db$"
    ):
        Tracking.open(tmp_path, "closed", "k0", {})
    assert slept == []


def test_hiccup_during_a_run_warns_once_and_loses_no_metric(
    storage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = Tracking.open(storage, "hiccup", "k0", {})
    stage = tracking.start_stage("sft", "sft", "k1", {})
    away = storage / "mlflow.db.away"
    tracking.client._tracking_client.store.engine.dispose()
    (storage / "mlflow.db").rename(away)
    with caplog.at_level(logging.WARNING, "zephyr_ray"):
        for step in range(5):
            stage.log_metrics({"loss": step}, step)
        stage.fail("first try")
    assert [r.name for r in caplog.records].count("zephyr_ray") == 1
    tracking.client._tracking_client.store.engine.dispose()
    away.replace(storage / "mlflow.db")
    stage.finish(Artifact(tmp_path, BARE))
    history = tracking.client.get_metric_history(stage.run_id, "loss")
    assert [m.value for m in history] == [0, 1, 2, 3, 4]
