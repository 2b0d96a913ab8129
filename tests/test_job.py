"""Tests the pipeline as a Ray job on a cluster started with `ray start`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_port

BIN = Path(sys.executable).parent
DASHBOARD_SECONDS = 400
STARTS = 3

RECIPE = """
name: job
models:
  base: {{weights: {weights}, temperature: 1.0, top_p: 1, concurrency: 8}}
stages:
  prompts: {{kind: prompts, seeds: seeds.jsonl, count: 6}}
  answers: {{kind: completions, models: [base], prompts: prompts, max_tokens: 8}}
"""


@dataclass
class Cluster:
    dashboard: str
    folder: str


def environment(folder: str) -> dict[str, str]:
    """Returns an environment in which programs find the cluster in `folder` as the local one."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")} | {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Runs `ray start --head --block` in its own process group until the module ends."""
    # Ray creates sockets in its folder, and socket paths must be short.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="zr", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "start.log")
        head, url = _start(folder, log)
        try:
            starts, deadline = 1, time.monotonic() + DASHBOARD_SECONDS
            while not _answers(f"{url}/api/jobs/"):
                assert time.monotonic() < deadline, log.read_text()
                if head.poll() is not None:
                    # Another program may take a port before Ray does.
                    assert starts < STARTS, log.read_text()
                    _end_group(head.pid)
                    head, url = _start(folder, log)
                    starts += 1
                time.sleep(0.5)
            yield Cluster(url, folder)
        finally:
            head.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(60)
            _end_group(head.pid)


def _start(folder: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Starts the head on free ports; returns its process and the address of its dashboard."""
    gcs, dashboard, listen, grpc, metrics = (free_port() for _ in range(5))
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard}", "--num-cpus=4"),
        f"--object-store-memory={256 * 1024**2}",
        # Other clusters on this machine may use the default ports; jobs need the agent.
        *(f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}"),
        f"--metrics-export-port={metrics}",
    ]
    with log.open("ab") as output:
        head = subprocess.Popen(
            command,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return head, f"http://127.0.0.1:{dashboard}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    tasks = [f"Name {n} things that are blue." for n in range(1, 9)]
    (tmp_path / "seeds.jsonl").write_text(
        "".join(json.dumps({"instruction": task}) + "\n" for task in tasks)
    )
    path = tmp_path / "job.yaml"
    path.write_text(RECIPE.format(weights=tiny_model))
    return path


def manifests(storage: Path) -> dict[str, dict]:
    contents = [json.loads(path.read_text()) for path in storage.glob("store/*/manifest.json")]
    return {manifest["name"]: manifest for manifest in contents}


def test_a_submitted_job_makes_its_artifacts_on_the_cluster(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    deadline = time.monotonic() + DASHBOARD_SECONDS
    while True:
        done = subprocess.run(
            [
                *(str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--"),
                *(sys.executable, "-m", "zephyr_ray.pipeline", str(recipe)),
                *("--set", f"storage={storage}"),
            ],
            env=environment(cluster.folder),
            capture_output=True,
            text=True,
            timeout=900,
        )
        # On a loaded machine, the dashboard answers long before its agent accepts jobs.
        not_yet = re.search("No available agent|Failed to connect", done.stderr)
        if not not_yet or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    # The submitter sees the pipeline's own lines.
    assert "answers: done" in done.stdout
    contents = manifests(storage)
    assert {name: m["counts"]["rows"] for name, m in contents.items()} == {
        "prompts": 6,
        "answers": 6,
    }
    assert (storage / "job" / "data" / "answers" / "rows.jsonl").is_file()
    assert _actors(cluster) == {"ALIVE": 0, "ever": 1}


def _actors(cluster: Cluster) -> dict[str, int]:
    """Counts the cluster's engine processes: those alive now, and those ever started."""
    with urllib.request.urlopen(
        f"{cluster.dashboard}/api/v0/actors?limit=1000&detail=1", timeout=30
    ) as response:
        answer = json.loads(response.read())
    rows = [a for a in answer["data"]["result"]["result"] if "EngineHost" in json.dumps(a)]
    return {"ALIVE": sum(a["state"] == "ALIVE" for a in rows), "ever": len(rows)}


def test_without_an_address_a_run_starts_its_own_cluster(
    cluster: Cluster, recipe: Path, tmp_path: Path
) -> None:
    """A cluster that happens to run on the machine is neither used nor a hindrance."""
    before = _actors(cluster)["ever"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "zephyr_ray.pipeline", str(recipe)),
            *("--set", f"storage={tmp_path / 'own'}"),
        ],
        env=environment(cluster.folder),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert set(manifests(tmp_path / "own")) == {"prompts", "answers"}
    assert _actors(cluster)["ever"] == before
