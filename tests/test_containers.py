"""Runs the chart's pods as containers, kills a worker and the head, and finishes the run.

Run with `make test-cluster`. One fixture does everything in sequence, because it is expensive, and
records observations.
"""

import base64
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_tools import kind, ray_specs, render
from container_lab import Lab, lab
from pod_flags import Document, RayPods, token

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]
IMAGE = os.environ.get("ZEPHYR_IMAGE", "localhost/zephyr-ray:0.1.0")
NAMESPACE = "lab"
JOB_SECONDS, START_SECONDS = 900, 240
MLFLOW = f"http://zephyr-mlflow.{NAMESPACE}.svc:5000"

RECIPE = """
name: tiny
models:
  # One row at a time, so that a kill hits the middle of the stage.
  base: {weights: /mnt/zephyr/tiny_model, temperature: 1.0, top_p: 1, concurrency: 1}
  judge: {engine: rules}
stages:
  prompts: {kind: prompts, seeds: seeds.jsonl}
  dialogues: {kind: self_refine, model: base, prompts: prompts, turns: 2, max_tokens: 48}
  clean: {kind: clean, dialogues: dialogues}
  sft:
    kind: sft
    model: base
    data: clean
    learning_rate: 1.0e-3
    epochs: 4
    global_batch: 3
    max_length: 256
    packing: false
    zero: 0
    checkpoint_every: 2
  completions: {kind: completions, models: [base], prompts: prompts, max_tokens: 8, per_prompt: 2}
  feedback: {kind: feedback, judge: judge, completions: completions}
  pairs: {kind: preferences, feedback: feedback, min_chosen: 1, ties: keep}
  dpo:
    kind: dpo
    model: sft
    data: pairs
    epochs: 1
    global_batch: 15
    max_length: 256
    zero: 2
  report: {kind: report, of: [sft, dpo, feedback]}
"""
STAGES = ["prompts", "dialogues", "clean", "sft", "completions", "feedback", "pairs", "dpo"]
STAGES += ["report"]
THINGS = ["apples", "bridges", "doors", "engines", "forests", "gardens", "hats", "islands", "jars"]


@dataclass
class Observations:
    """Observations of the run, which the tests check."""

    users: dict[str, str] = field(default_factory=dict)
    writes_refused: dict[str, int] = field(default_factory=dict)
    without_token: str = ""
    without_password: str = ""
    rows_at_kill: int = 0
    steps_at_kill: int = 0
    done_before: dict[str, float] = field(default_factory=dict)
    done_after: dict[str, float] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    ended: str = ""
    log: str = ""
    runs: list[Document] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Platform:
    """Runs the rendered chart in the lab and plays the operator."""

    def __init__(self, here: Lab, rendered: list[Document]):
        self.here = here
        self.accounts = {
            "username": "zephyr",
            "password": secrets.token_hex(16),
            "flask-secret-key": secrets.token_hex(16),
            "ZEPHYR_API_KEYS": secrets.token_hex(16),
        }
        (cluster,) = kind(rendered, "RayCluster")
        here.node.secrets = {
            "zephyr-accounts": self.accounts,
            cluster["metadata"]["name"]: {"auth_token": secrets.token_hex(32)},
        }
        here.node.config_maps = {
            d["metadata"]["name"]: d.get("data", {}) for d in kind(rendered, "ConfigMap")
        }
        self.pods = RayPods(cluster["metadata"]["name"], NAMESPACE, ray_specs([cluster])[0])
        self.mlflow = kind(rendered, "Deployment")[0]["spec"]["template"]
        (self.job,) = kind(rendered, "RayJob")
        self.storage = here.node.claim("zephyr-storage")
        self.store = self.storage / "runs" / "store"

    def start_mlflow(self) -> None:
        self.here.start(self.mlflow, "mlflow", f"zephyr-mlflow.{NAMESPACE}.svc")

    def start_head(self, name: str) -> None:
        pod = self.pods.head(name)
        # Starts the pod with its Service, and waits as the operator does before it starts workers.
        self.here.start(pod, name, self.pods.head_service)
        ready = ("ray", "health-check", "--address", "127.0.0.1:6379")
        self.until(lambda: self.here.execute(name, *ready)[0] == 0, START_SECONDS, name, every=1)

    def start_worker(self, name: str) -> None:
        (group,) = self.pods.spec["workerGroupSpecs"]
        self.here.start(self.pods.worker(group, name), name)

    def start_submitter(self) -> None:
        """Starts the chart's submitter pod and keeps it for all commands."""
        pod = json.loads(json.dumps(self.job["spec"]["submitterPodTemplate"]))
        container = pod["spec"]["containers"][0]
        container |= {"command": ["sleep"], "args": ["infinity"]}
        container["env"] += token(self.pods.spec, self.pods.name)
        self.here.start(pod, "submitter")

    @property
    def dashboard(self) -> str:
        return f"http://{self.pods.head_service}:8265"

    def submit(self, name: str) -> None:
        """Submits like the operator's submitter, which also passes the entry point to a shell."""
        line = f"ray job submit --address {self.dashboard} --no-wait --submission-id {name}"
        output = ""
        for _ in range(20):
            code, output = self.here.execute(
                *("submitter", "bash", "-ce", f"{line} -- {self.job['spec']['entrypoint']}")
            )
            if code == 0:
                return
            time.sleep(5)  # the dashboard starts after the head
        raise AssertionError(output)

    def ended(self, name: str) -> str:
        """Returns "succeeded", "failed" or "was stopped"; empty while the job runs."""
        _, output = self.here.execute(
            *("submitter", "ray", "job", "status", "--address", self.dashboard, name)
        )
        match = re.search(f"Job '{name}' (succeeded|failed|was stopped)", output)
        return match[1] if match else ""

    def job_log(self, name: str) -> str:
        _, output = self.here.execute(
            *("submitter", "ray", "job", "logs", "--address", self.dashboard, name)
        )
        return output

    def journal(self, stage: str, name: str) -> list[Document]:
        entries = []
        for path in self.store.glob(f"{stage}-*/scratch/{name}/*.jsonl"):
            for line in path.read_text().splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    continue  # empty, or cut off by the kill
        return entries

    def manifests(self) -> dict[str, Path]:
        paths = self.store.glob("*/manifest.json")
        return {json.loads(path.read_text())["name"]: path for path in paths}

    def ask_mlflow(self, path: str, body: Any = None, password: str | None = None) -> str:
        """Asks MLflow from the submitter pod; returns the answer's body, then its headers."""
        account = f"{self.accounts['username']}:{password or self.accounts['password']}"
        header = "Authorization: Basic " + base64.b64encode(account.encode()).decode()
        post = ["--header=Content-Type: application/json", f"--post-data={json.dumps(body)}"]
        _, output = self.here.execute(
            *("submitter", "wget", "-nv", "-S", "-O-", "--tries=1", f"--header={header}"),
            *(post if body else []),
            f"{MLFLOW}{path}",
        )
        return output

    def until(
        self,
        condition: Callable[[], bool],
        seconds: float,
        *pods: str,
        job: str = "",
        every: float = 0.1,
    ) -> None:
        """Waits for `condition()`. Raises AssertionError with the pods' logs on a timeout, or if a
        pod or the job ends first."""
        began = checked = time.monotonic()
        while not condition():
            now, problem = time.monotonic(), ""
            if now - began > seconds:
                problem = f"timed out after {seconds} s"
            if dead := [p for p in pods if self.here.state(p) not in ("running", "created")]:
                problem = f"ended: {dead}"
            if job and now - checked > 20:
                checked = now
                problem = self.job_log(job) if self.ended(job) else problem
            if problem:
                logs = [f"--- {pod}\n{self.here.logs(pod)}" for pod in pods]
                raise AssertionError("\n".join([problem, *logs]))
            time.sleep(every)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    folder = tmp_path_factory.mktemp("cluster")
    tasks = [
        {"instruction": f"Describe {2 + n} {THINGS[n % 9]} in plain {style} words."}
        for n, style in zip(range(36), THINGS * 4, strict=False)
    ]
    seeds = "".join(json.dumps(task) + "\n" for task in tasks)
    values = folder / "values.yaml"
    values.write_text(
        yaml.safe_dump(
            {
                "image": {"repository": IMAGE.rpartition(":")[0], "tag": IMAGE.rpartition(":")[2]},
                "cluster": {"enabled": True},
                "pipeline": {"enabled": True, "recipe": "tiny.yaml"},
                "recipes": {"tiny.yaml": RECIPE, "seeds.jsonl": seeds},
            }
        )
    )
    rendered = render("values-kind.yaml", str(values))
    with lab(folder, IMAGE) as here:
        yield _run(Platform(here, rendered), tiny_model)


def _run(platform: Platform, tiny_model: Path) -> Observations:
    here, observed, began = platform.here, Observations(), time.monotonic()

    def note(event: str) -> None:
        observed.seconds[event] = round(time.monotonic() - began, 1)
        print(f"{observed.seconds[event]:7.1f} s  {event}", flush=True)

    platform.start_mlflow()
    platform.start_head("head-1")
    note("head answers")
    platform.start_worker("worker-1")
    platform.start_submitter()
    shutil.copytree(tiny_model, platform.storage / "tiny_model")
    for path in [platform.storage / "tiny_model", *(platform.storage / "tiny_model").iterdir()]:
        path.chmod(path.stat().st_mode | 0o055)
    platform.until(
        lambda: platform.ask_mlflow("/health").startswith("OK"), START_SECONDS, "mlflow", every=1
    )
    note("MLflow answers")
    for pod in ("mlflow", "head-1", "worker-1"):
        observed.users[pod] = here.execute(pod, "id", "-u")[1].strip()
        observed.writes_refused[pod] = here.execute(pod, "touch", "/home/zephyr/x")[0]
    observed.without_token = here.execute(
        *("submitter", "wget", "-nv", "-S", "-O-", "--tries=1", f"{platform.dashboard}/api/jobs/")
    )[1]
    observed.without_password = platform.ask_mlflow(
        "/api/2.0/mlflow/runs/search", {}, "not this one"
    )

    platform.submit("run-1")
    note("submitted")
    alive = ("head-1", "mlflow")
    rows = lambda: len(platform.journal("self_refine", "rows"))  # noqa: E731
    platform.until(lambda: rows() >= 4, JOB_SECONDS, *alive, job="run-1")
    here.kill("worker-1")
    observed.rows_at_kill = rows()
    note("worker killed")
    here.remove("worker-1")
    platform.start_worker("worker-2")
    platform.until(
        lambda: rows() > observed.rows_at_kill or "dialogues" in platform.manifests(),
        JOB_SECONDS,
        *alive,
        job="run-1",
    )
    note("rows go on")

    states = "sft-*/scratch/checkpoints/checkpoint_manager_snapshot.json"
    platform.until(
        lambda: any("checkpoint-" in path.read_text() for path in platform.store.glob(states)),
        JOB_SECONDS,
        *alive,
        job="run-1",
    )
    here.kill("head-1")
    observed.steps_at_kill = len({row["step"] for row in platform.journal("sft", "steps")})
    note("head killed")
    observed.done_before = {
        name: path.stat().st_mtime for name, path in platform.manifests().items()
    }
    here.remove("head-1")
    platform.start_head("head-2")
    note("new head answers")
    # A worker exits when its head is gone, and the operator replaces it.
    platform.until(lambda: here.state("worker-2") == "exited", START_SECONDS, every=1)
    note("old worker ended")
    here.remove("worker-2")
    platform.start_worker("worker-3")
    platform.submit("run-2")
    note("submitted again")
    second = ("head-2", "worker-3", "mlflow")
    platform.until(lambda: platform.ended("run-2") != "", JOB_SECONDS, *second, every=5)
    note("ended")
    observed.ended, observed.log = platform.ended("run-2"), platform.job_log("run-2")
    manifests = platform.manifests()
    observed.done_after = {name: path.stat().st_mtime for name, path in manifests.items()}
    observed.attempts = {n: json.loads(p.read_text())["attempts"] for n, p in manifests.items()}
    body = json.JSONDecoder().raw_decode
    answer = platform.ask_mlflow("/api/2.0/mlflow/experiments/get-by-name?experiment_name=tiny")
    experiment = body(answer)[0]["experiment"]["experiment_id"]
    query = {"experiment_ids": [experiment], "max_results": 100}
    observed.runs = body(platform.ask_mlflow("/api/2.0/mlflow/runs/search", query))[0]["runs"]
    return observed


def test_pods_run_as_the_charts_user(observed: Observations) -> None:
    assert set(observed.users.values()) == {"1000"}
    assert all(observed.writes_refused.values())


def test_ray_and_mlflow_reject_requests_without_credentials(observed: Observations) -> None:
    assert "401" in observed.without_token, observed.without_token
    assert "401" in observed.without_password, observed.without_password


def test_a_lost_worker_costs_no_answered_row(observed: Observations) -> None:
    assert 4 <= observed.rows_at_kill < 36
    assert "dialogues" in observed.done_before
    assert observed.attempts["dialogues"] == 1  # the same driver, on a new worker


def test_a_run_finishes_from_the_store_after_losing_its_head(observed: Observations) -> None:
    assert observed.ended == "succeeded", observed.log
    assert sorted(observed.done_after) == sorted(STAGES)
    assert {"prompts", "dialogues", "clean"} <= set(observed.done_before)
    again = {name: observed.done_after[name] for name in observed.done_before}
    assert again == observed.done_before  # made once, reused
    assert observed.steps_at_kill >= 2 and observed.attempts["sft"] == 2


def test_mlflow_has_the_complete_run(observed: Observations) -> None:
    state = {run["info"]["run_name"]: run["info"]["status"] for run in observed.runs}
    assert state == dict.fromkeys(["tiny", *STAGES], "FINISHED")
    (sft,) = [run for run in observed.runs if run["info"]["run_name"] == "sft"]
    metrics = {metric["key"]: metric["value"] for metric in sft["data"]["metrics"]}
    assert metrics["train/loss_final"] > 0
