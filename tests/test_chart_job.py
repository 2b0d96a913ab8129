"""Tests the chart's RayJob: its program, its retries, and when its pods end."""

import os
import re
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from chart_tools import ROOT, SERVE, kind, ray_specs, render, template

from zephyr_ray import recipe as recipes
from zephyr_ray.cluster.job import ray_job
from zephyr_ray.cluster.profile import load
from zephyr_ray.estimate.printing import estimate_lines
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.store import JOB_VARIABLE, Store


def job_spec(*values: str, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    (job,) = kind(render(*values or ("values-kind.yaml",), sets=sets), "RayJob")
    spec: dict[str, Any] = job["spec"]
    return spec


def run_job(spec: dict[str, Any], folder: Path, program: str) -> tuple[int, list[list[str]]]:
    """Runs the entry point with `program` in place of Python. As in a cluster, the shells of the
    submitter and of the head parse it in turn. Returns the exit code and each start's arguments."""
    for name, text in {"python": program, "sleep": 'echo "$1" >> "$CALLS.sleep"'}.items():
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> "$CALLS"\n{text}\n')
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "X": "wrong"}
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {spec['entrypoint']}"], capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    done = subprocess.run(["sh", "-c", shlex.join(words)], env=environment)
    passed = calls.read_text().split("\0")[:-1]
    starts = [i for i, word in enumerate(passed) if word == "zephyr_ray.pipeline"]
    return done.returncode, [
        passed[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]


def test_the_words_of_the_program_are_quoted(tmp_path: Path) -> None:
    spec = job_spec(sets=("pipeline.set[0]=stage.text=it's; rm -rf $X `X`", "pipeline.until=dpo"))
    code, starts = run_job(spec, tmp_path, "exit 0")
    assert code == 0
    assert starts == [
        [
            *("zephyr_ray.pipeline", "--set", "storage=/mnt/zephyr/runs", "--wait", "900"),
            *("--set", "stage.text=it's; rm -rf $X `X`", "--until", "dpo"),
        ]
    ]


def test_retries_are_one_attempt(tmp_path: Path) -> None:
    program = 'echo "$ZEPHYR_ATTEMPT" >> "$CALLS.attempts"; /bin/sleep 1.1; exit 1'
    run_job(job_spec(sets=("pipeline.backoffLimit=1",)), tmp_path, program)
    first, second = (tmp_path / "calls.attempts").read_text().split()
    assert first == second and datetime.fromisoformat(first).tzinfo == UTC


def test_the_kubelet_expands_no_variable(tmp_path: Path) -> None:
    """The operator writes the entry point into args, where the kubelet expands $(NAME)."""
    spec = job_spec(sets=("pipeline.set[0]=stage.text=$(HOME)",))
    assert "$(HOME)" not in spec["entrypoint"]
    _, [words] = run_job(spec, tmp_path, "exit 0")
    assert words[-1] == "stage.text=$(HOME)"


def test_a_user_error_is_not_retried_anywhere(tmp_path: Path) -> None:
    spec = job_spec()
    code, starts = run_job(spec, tmp_path, "exit 2")
    assert (code, len(starts)) == (2, 1)
    assert spec["backoffLimit"] == 0, "each retry of the operator starts a new cluster"


@pytest.mark.parametrize(
    ("program", "code", "count"),
    [
        ("exit 1", 1, 3),
        ("kill -9 $$", 137, 3),
        ('test -e "$CALLS.sleep"', 0, 2),
        ('test -e "$CALLS.sleep" || exit 1; exit 2', 2, 2),
    ],
)
def test_other_failures_are_retried_on_the_same_cluster(
    tmp_path: Path, program: str, code: int, count: int
) -> None:
    actual, starts = run_job(job_spec(sets=("pipeline.backoffLimit=2",)), tmp_path, program)
    assert (actual, len(starts)) == (code, count)
    delays = (tmp_path / "calls.sleep").read_text().split()
    assert delays == ["30", "60"][: count - 1]


def test_the_submitter_submits_again_to_a_new_head() -> None:
    spec = job_spec()
    assert spec["submissionMode"] == "K8sJobMode" and spec["submitterConfig"] == {"backoffLimit": 2}


def test_workers_end_with_the_job_and_the_head_later() -> None:
    spec = job_spec("values-gpu-8.yaml", sets=("pipeline.ttlSecondsAfterFinished=60",))
    rules = spec["deletionStrategy"]["deletionRules"]
    assert [(rule["policy"], rule["condition"]) for rule in rules] == [
        ("DeleteWorkers", {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}),
        ("DeleteCluster", {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}),
        ("DeleteWorkers", {"jobDeploymentStatus": "Failed", "ttlSeconds": 0}),
        ("DeleteCluster", {"jobDeploymentStatus": "Failed", "ttlSeconds": 60}),
    ]
    assert "shutdownAfterJobFinishes" not in spec, "the operator rejects it with rules"
    assert spec["ttlSecondsAfterFinished"] == 0, "the operator rejects it with rules"


@pytest.mark.parametrize(
    ("preset", "sets", "seconds"),
    [
        ("values-multinode.yaml", (), 0),
        ("values-gpu-8.yaml", ("pipeline.autoscaling=true",), 300),
        ("values-gpu-8.yaml", ("pipeline.suspend=true",), 300),
    ],
)
def test_without_rules_all_pods_end_together(
    preset: str, sets: tuple[str, ...], seconds: int
) -> None:
    """The operator rejects DeleteWorkers with autoscaling, and deletion rules with `suspend`."""
    spec = job_spec(preset, sets=sets)
    assert spec["shutdownAfterJobFinishes"] is True and "deletionStrategy" not in spec
    assert spec["ttlSecondsAfterFinished"] == seconds


@pytest.mark.parametrize("preset", ["kind", "gpu-8", "multinode"])
def test_the_workers_have_the_gpus_and_the_memory_of_the_plan(preset: str, tmp_path: Path) -> None:
    spec = job_spec(f"values-{preset}.yaml")
    [name] = re.findall(r"configs/\S+\.yaml", spec["entrypoint"]) or ["configs/quickstart.yaml"]
    recipe = recipes.load(ROOT / name, KINDS, [f"storage={tmp_path}"])
    store = Store(recipe.storage)
    lines = "\n".join(estimate_lines(recipe, store, make_plan(recipe, store, None)))
    group = spec["rayClusterSpec"]["workerGroupSpecs"][-1]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = group["replicas"] * int(limits.get("nvidia.com/gpu", 0))
    planned = re.findall(r"\((\d+) (GPU|worker)s?, ZeRO", lines)
    assert planned and {int(count) for count, device in planned if device == "GPU"} <= {gpus}
    assert (gpus > 0) is all(device == "GPU" for _, device in planned)
    memory = float(limits["memory"].removesuffix("Gi"))
    workers = int(planned[0][0]) / group["replicas"]
    for per_worker in re.findall(r"memory +([\d.]+) GiB per worker", lines):
        assert float(per_worker) * workers <= memory


def test_metrics_are_read_from_jobs_of_zephyr_submit_too(tmp_path: Path) -> None:
    sets = ("podMonitor.enabled=true", "networkPolicy.prometheusNamespace=monitoring")
    rendered = render(sets=(*SERVE, *sets, "pipeline.enabled=true"))
    monitored = [m["spec"]["selector"]["matchLabels"] for m in kind(rendered, "PodMonitor")]
    profile = tmp_path / "profile.yaml"
    profile.write_text("image: i\nstorage: {claim: c}\nworkers: {cpu: {cpu: 1, memory: 2Gi}}\n")
    submitted = ray_job("small-abcde", load(profile))["spec"]["rayClusterSpec"]
    for spec in [*ray_specs(rendered), submitted]:
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            labels = {**group["template"]["metadata"]["labels"], "ray.io/is-ray-node": "yes"}
            [_] = [wanted for wanted in monitored if wanted.items() <= labels.items()]


def test_only_the_pods_of_the_job_know_its_name() -> None:
    rendered = render(sets=(*SERVE, "pipeline.enabled=true", "pipeline.run=3"))
    for document in rendered:
        if document["kind"] in ("RayCluster", "RayJob", "RayService"):
            own = [{"name": JOB_VARIABLE, "value": "zephyr-run-3"}]
            [spec] = ray_specs([document])
            for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
                env = group["template"]["spec"]["containers"][0]["env"]
                named = [e for e in env if e["name"] == JOB_VARIABLE]
                assert named == (own if document["kind"] == "RayJob" else [])


def test_a_large_deadline_is_an_integer() -> None:
    """Helm reads numbers as floats, and a million prints as 1e+06."""
    done = template(
        given={
            "pipeline": {"enabled": True, "activeDeadlineSeconds": 1000000},
            "mlflow": {"auth": {"existingSecret": "s"}},
        }
    )
    assert "  activeDeadlineSeconds: 1000000\n" in done.stdout
