"""Provides a folder with a recipe, a profile and a kubeconfig, and the fake cluster they name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_api import Api

from zephyr_ray import cli
from zephyr_ray.cluster import logs, watch

RECIPE = """
name: small
models:
  judge: {engine: openai, model: gpt, base_url: "http://judge/v1", api_key_env: JUDGE_KEY}
  base: {weights: owner/tiny}
stages:
  prompts: {kind: prompts, seeds: seeds/train.jsonl, count: 2}
  answers: {kind: completions, models: [base], prompts: prompts, max_tokens: 8}
  feedback: {kind: feedback, judge: judge, completions: answers}
"""
PROFILE: dict[str, Any] = {
    "namespace": "team",
    "image": "registry.example/zephyr-ray:1.0",
    "image_pull_secrets": ["login"],
    "storage": {"claim": "shared"},
    "mlflow": "http://mlflow:5000",
    "secrets": {"JUDGE_KEY": {"name": "keys", "key": "judge"}},
    "head": {"cpu": 2, "memory": "8Gi"},
    "workers": {
        "cpu": {"replicas": 1, "cpu": 4, "memory": "16Gi"},
        "gpu": {
            "replicas": 2,
            "cpu": "8",
            "memory": "64Gi",
            "gpu": {"count": 4},
            "image": "registry.example/zephyr-ray:1.0-gpu",
            "node_selector": {"pool": "a100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    },
    "queue": "research",
    "active_deadline_seconds": 3600,
}
TEAM = "/api/v1/namespaces/team"
JOBS = "/apis/ray.io/v1/namespaces/team/rayjobs"


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    api.objects["/apis/ray.io/v1"] = {"resources": [{"name": "rayclusters"}, {"name": "rayjobs"}]}
    yield api
    api.close()
    for thread in api.operators:
        thread.join(60)
    assert not api.operator_error and not any(thread.is_alive() for thread in api.operators)


@pytest.fixture
def here(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with a recipe, a profile and a kubeconfig; shortens pauses."""
    (tmp_path / "seeds").mkdir()
    tasks = ["Name a blue thing.", "Name a green thing."]
    lines = [json.dumps({"instruction": task}) for task in tasks]
    (tmp_path / "seeds" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "small.yaml").write_text(RECIPE)
    write_profile(tmp_path)
    (tmp_path / "kubeconfig").write_text(api.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(watch, "STARTING_SECONDS", 1)
    monkeypatch.setattr(watch, "RUNNING_SECONDS", 1)
    monkeypatch.setattr(logs, "PAUSE_SECONDS", 0.05)
    return tmp_path


def write_profile(folder: Path, **changes: Any) -> None:
    changed = {k: v for k, v in (PROFILE | changes).items() if v is not None}
    (folder / "zephyr-cluster.yaml").write_text(yaml.safe_dump(changed))


def end_job(api: Api, name: str, job: str = "SUCCEEDED", **status: Any) -> None:
    deployment = "Failed" if job == "FAILED" else "Complete"
    api.status(name, jobDeploymentStatus=deployment, jobStatus=job, **status)


def created_job(api: Api) -> dict[str, Any]:
    [job] = [o for path, o in api.objects.items() if path.startswith(f"{JOBS}/")]
    return job


def error(capsys: pytest.CaptureFixture, *command: str, code: int = 2) -> str:
    """Runs a command that must fail and returns its single error line."""
    assert cli.main(list(command)) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line
