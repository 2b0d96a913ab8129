"""The chart's own pods as containers: a recipe through `ray job submit`, killed twice, finished.

`make test-cluster`. One fixture does all of it in sequence, as it is dear, and notes what it saw.
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
  # One row at a time, so that a kill finds the stage in the middle.
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
class Seen:
    """What the run showed, in its order."""

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
    """The rendered chart in the lab, and what the operator would do for it."""

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
        # The Service, and what the operator waits for before it starts workers.
        self.here.start(pod, name, self.pods.head_service)
        ready = ("ray", "health-check", "--address", "127.0.0.1:6379")
        self.until(lambda: self.here.execute(name, *ready)[0] == 0, START_SECONDS, name, every=1)

    def start_worker(self, name: str) -> None:
        (group,) = self.pods.spec["workerGroupSpecs"]
        self.here.start(self.pods.worker(group, name), name)

    def start_submitter(self) -> None:
        """The chart's submitter pod; it stays, so that each command need not start one."""
        pod = json.loads(json.dumps(self.job["spec"]["submitterPodTemplate"]))
        container = pod["spec"]["containers"][0]
        container |= {"command": ["sleep"], "args": ["infinity"]}
        container["env"] += token(self.pods.spec, self.pods.name)
        self.here.start(pod, "submitter")

    @property
    def dashboard(self) -> str:
        return f"http://{self.pods.head_service}:8265"

    def submit(self, name: str) -> None:
        """As the operator's submitter does; the entry point is pasted into a shell there, too."""
        line = f"ray job submit --address {self.dashboard} --no-wait --submission-id {name}"
        said = ""
        for _ in range(20):
            code, said = self.here.execute(
                *("submitter", "bash", "-ce", f"{line} -- {self.job['spec']['entrypoint']}")
            )
            if code == 0:
                return
            time.sleep(5)  # the dashboard comes up after the head
        raise AssertionError(said)

    def ended(self, name: str) -> str:
        """How the job ended: "succeeded", "failed", "was stopped"; empty while it runs."""
        _, said = self.here.execute(
            *("submitter", "ray", "job", "status", "--address", self.dashboard, name)
        )
        found = re.search(f"Job '{name}' (succeeded|failed|was stopped)", said)
        return found[1] if found else ""

    def job_log(self, name: str) -> str:
        _, said = self.here.execute(
            *("submitter", "ray", "job", "logs", "--address", self.dashboard, name)
        )
        return said

    def journal(self, stage: str, name: str) -> list[Document]:
        entries = []
        for path in self.store.glob(f"{stage}-*/scratch/{name}/*.jsonl"):
            for line in path.read_text().splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    continue  # empty, or cut short by the kill
        return entries

    def manifests(self) -> dict[str, Path]:
        paths = self.store.glob("*/manifest.json")
        return {json.loads(path.read_text())["name"]: path for path in paths}

    def ask_mlflow(self, path: str, body: Any = None, password: str | None = None) -> str:
        """Over HTTP from the submitter's pod: the answer's body, then its head."""
        account = f"{self.accounts['username']}:{password or self.accounts['password']}"
        header = "Authorization: Basic " + base64.b64encode(account.encode()).decode()
        post = ["--header=Content-Type: application/json", f"--post-data={json.dumps(body)}"]
        _, said = self.here.execute(
            *("submitter", "wget", "-nv", "-S", "-O-", "--tries=1", f"--header={header}"),
            *(post if body else []),
            f"{MLFLOW}{path}",
        )
        return said

    def until(
        self,
        true: Callable[[], bool],
        seconds: float,
        *pods: str,
        job: str = "",
        every: float = 0.1,
    ) -> None:
        """Until it is true; else an error with what these pods said."""
        began = asked = time.monotonic()
        while not true():
            now, wrong = time.monotonic(), ""
            if now - began > seconds:
                wrong = f"{seconds} s are over"
            if dead := [p for p in pods if self.here.state(p) not in ("running", "created")]:
                wrong = f"ended: {dead}"
            if job and now - asked > 20:
                asked = now
                wrong = self.job_log(job) if self.ended(job) else wrong
            if wrong:
                logs = [f"--- {pod}\n{self.here.logs(pod)}" for pod in pods]
                raise AssertionError("\n".join([wrong, *logs]))
            time.sleep(every)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
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


def _run(platform: Platform, tiny_model: Path) -> Seen:
    here, saw, began = platform.here, Seen(), time.monotonic()

    def note(what: str) -> None:
        saw.seconds[what] = round(time.monotonic() - began, 1)
        print(f"{saw.seconds[what]:7.1f} s  {what}", flush=True)

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
        saw.users[pod] = here.execute(pod, "id", "-u")[1].strip()
        saw.writes_refused[pod] = here.execute(pod, "touch", "/home/zephyr/x")[0]
    saw.without_token = here.execute(
        *("submitter", "wget", "-nv", "-S", "-O-", "--tries=1", f"{platform.dashboard}/api/jobs/")
    )[1]
    saw.without_password = platform.ask_mlflow("/api/2.0/mlflow/runs/search", {}, "not this one")

    platform.submit("run-1")
    note("submitted")
    alive = ("head-1", "mlflow")
    rows = lambda: len(platform.journal("self_refine", "rows"))  # noqa: E731
    platform.until(lambda: rows() >= 4, JOB_SECONDS, *alive, job="run-1")
    here.kill("worker-1")
    saw.rows_at_kill = rows()
    note("worker killed")
    here.remove("worker-1")
    platform.start_worker("worker-2")
    platform.until(
        lambda: rows() > saw.rows_at_kill or "dialogues" in platform.manifests(),
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
    saw.steps_at_kill = len({row["step"] for row in platform.journal("sft", "steps")})
    note("head killed")
    saw.done_before = {name: path.stat().st_mtime for name, path in platform.manifests().items()}
    here.remove("head-1")
    platform.start_head("head-2")
    note("new head answers")
    # A worker of a head that is gone ends by itself, and the operator makes a new one.
    platform.until(lambda: here.state("worker-2") == "exited", START_SECONDS, every=1)
    note("old worker ended")
    here.remove("worker-2")
    platform.start_worker("worker-3")
    platform.submit("run-2")
    note("submitted again")
    second = ("head-2", "worker-3", "mlflow")
    platform.until(lambda: platform.ended("run-2") != "", JOB_SECONDS, *second, every=5)
    note("ended")
    saw.ended, saw.log = platform.ended("run-2"), platform.job_log("run-2")
    manifests = platform.manifests()
    saw.done_after = {name: path.stat().st_mtime for name, path in manifests.items()}
    saw.attempts = {n: json.loads(p.read_text())["attempts"] for n, p in manifests.items()}
    body = json.JSONDecoder().raw_decode
    found = platform.ask_mlflow("/api/2.0/mlflow/experiments/get-by-name?experiment_name=tiny")
    experiment = body(found)[0]["experiment"]["experiment_id"]
    query = {"experiment_ids": [experiment], "max_results": 100}
    saw.runs = body(platform.ask_mlflow("/api/2.0/mlflow/runs/search", query))[0]["runs"]
    return saw


def test_pods_run_as_the_chart_says(seen: Seen) -> None:
    assert set(seen.users.values()) == {"1000"}
    assert all(seen.writes_refused.values())


def test_ray_and_mlflow_answer_nobody_without_credentials(seen: Seen) -> None:
    assert "401" in seen.without_token, seen.without_token
    assert "401" in seen.without_password, seen.without_password


def test_a_lost_worker_costs_no_answered_row(seen: Seen) -> None:
    assert 4 <= seen.rows_at_kill < 36
    assert "dialogues" in seen.done_before
    assert seen.attempts["dialogues"] == 1  # the same driver, on a new worker


def test_a_lost_head_is_finished_from_the_store(seen: Seen) -> None:
    assert seen.ended == "succeeded", seen.log
    assert sorted(seen.done_after) == sorted(STAGES)
    assert {"prompts", "dialogues", "clean"} <= set(seen.done_before)
    again = {name: seen.done_after[name] for name in seen.done_before}
    assert again == seen.done_before  # made once, read twice
    assert seen.steps_at_kill >= 2 and seen.attempts["sft"] == 2


def test_mlflow_has_the_run_whole(seen: Seen) -> None:
    state = {run["info"]["run_name"]: run["info"]["status"] for run in seen.runs}
    assert state == dict.fromkeys(["tiny", *STAGES], "FINISHED")
    (sft,) = [run for run in seen.runs if run["info"]["run_name"] == "sft"]
    metrics = {metric["key"]: metric["value"] for metric in sft["data"]["metrics"]}
    assert metrics["train/loss_final"] > 0
