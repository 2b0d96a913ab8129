"""Tests the RayJob and the ConfigMap that are built from a profile and a recipe."""

import os
import re
import shlex
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_lab import RECIPE, write_profile
from crds import crd_errors

from zephyr_ray import pipeline, recipe_file
from zephyr_ray import recipe as recipes
from zephyr_ray.cluster import bundle
from zephyr_ray.cluster.job import HEAD_SECONDS, WAIT_SECONDS, job_name, ray_job
from zephyr_ray.cluster.profile import load
from zephyr_ray.errors import Permanent
from zephyr_ray.lease import EXPIRE_SECONDS


def job_of(here: Path) -> dict[str, Any]:
    return ray_job("small-abcde", load(here / "zephyr-cluster.yaml"))


def ray_pods(here: Path) -> list[dict[str, Any]]:
    """Returns the pod specs of the head and of each worker group."""
    cluster = job_of(here)["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_job_matches_kuberays_schema(here: Path) -> None:
    job = job_of(here)
    assert crd_errors("rayjobs", job) == []


def test_the_strict_schema_rejects_a_misspelled_field(here: Path) -> None:
    job = job_of(here)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    [output] = crd_errors("rayjobs", job)
    assert "'minReplica' was unexpected" in output


def test_the_job_meets_the_operators_rules(here: Path) -> None:
    job = job_of(here)
    spec = job["spec"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 0)
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (0, 3600)
    cluster = spec["rayClusterSpec"]
    assert (cluster["authOptions"], cluster["rayVersion"]) == ({"mode": "token"}, "2.60.0")
    head, (cpu, gpu) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, cpu, gpu):
        assert "resources" not in group  # Ray reads the limits
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        amounts = group["template"]["spec"]["containers"][0]["resources"]
        assert amounts["limits"] == amounts["requests"]
    assert (gpu["minReplicas"], gpu["replicas"], gpu["maxReplicas"]) == (2, 2, 2)
    pod = gpu["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {
        "cpu": "8",
        "memory": "64Gi",
        "nvidia.com/gpu": "4",
    }
    assert [g["template"]["spec"]["containers"][0]["image"][-4:] for g in (head, cpu, gpu)] == [
        *(":1.0", ":1.0", "-gpu")
    ]
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]


def run_entrypoint(spec: dict[str, Any], folder: Path, codes: list[int]) -> tuple[int, list[str]]:
    """Runs the entry point as in a cluster, where the shells of the submitter and of the head parse
    it in turn. Python is replaced by a program that exits with the next of the codes. Returns the
    exit code, and the calls of python and sleep."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    python = "echo $ZEPHYR_ATTEMPT >> attempts\nexit $(sed -n ${starts}p codes)"
    for name, end in {"python": python, "sleep": ""}.items():
        program = f'#!/bin/sh\necho {name} "$@" >> calls\nstarts=$(grep -c python calls)\n{end}\n'
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    shell = {"cwd": folder, "env": {"PATH": f"{folder}:{os.environ['PATH']}"}}
    submitter = ["bash", "-c", f"printf '%s\\0' {spec['entrypoint']}"]
    words = subprocess.run(submitter, capture_output=True, text=True, **shell).stdout.split("\0")
    code = subprocess.run(["sh", "-c", shlex.join(words[:-1])], **shell).returncode
    return code, (folder / "calls").read_text().splitlines()


START = "python -m zephyr_ray.pipeline /etc/zephyr/recipe.yaml --wait 900"


@pytest.mark.parametrize(
    ("codes", "code", "calls"),
    [
        ([0], 0, [START]),
        ([1, 0], 0, [START, "sleep 30", START]),
        ([2], 2, [START]),
        ([137, 2], 2, [START, "sleep 30", START]),
        ([1, 1, 137], 137, [START, "sleep 30", START, "sleep 60", START]),
    ],
)
def test_a_failed_run_is_retried_on_its_cluster_but_a_user_error_is_not(
    here: Path, codes: list[int], code: int, calls: list[str]
) -> None:
    assert run_entrypoint(job_of(here)["spec"], here, codes) == (code, calls)


def test_all_starts_of_an_entry_point_are_one_attempt(here: Path) -> None:
    """Otherwise a program restarted on a lost head would count as newer than that of a new head."""
    (here / "date").write_text(f'#!/bin/sh\necho >> dates\nexec {shutil.which("date")} "$@"\n')
    (here / "date").chmod(0o755)
    run_entrypoint(job_of(here)["spec"], here, [1, 0])
    first, second = (here / "attempts").read_text().splitlines()
    assert abs(datetime.fromisoformat(first) - datetime.now(UTC)).total_seconds() < 60
    assert second == first and (here / "dates").read_text() == "\n"


def test_a_job_waits_until_a_job_past_its_deadline_frees_the_storage() -> None:
    """The driver of the earlier job holds the storage until its head ends and the lease expires."""
    assert WAIT_SECONDS > HEAD_SECONDS + EXPIRE_SECONDS


@pytest.mark.parametrize(("seconds", "head"), [(None, 600), (0, 0), (60, 60)])
def test_the_workers_end_with_the_job_and_the_head_later(
    here: Path, seconds: int | None, head: int
) -> None:
    write_profile(here, queue=None, ttl_seconds=seconds)
    job = job_of(here)
    assert crd_errors("rayjobs", job) == []
    # The operator rejects deletion rules together with these fields.
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & job["spec"].keys()
    rules = job["spec"]["deletionStrategy"]["deletionRules"]
    assert [(rule["policy"], rule["condition"]) for rule in rules] == [
        ("DeleteWorkers", {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}),
        ("DeleteCluster", {"jobStatus": "SUCCEEDED", "ttlSeconds": head}),
        ("DeleteWorkers", {"jobDeploymentStatus": "Failed", "ttlSeconds": 0}),
        ("DeleteCluster", {"jobDeploymentStatus": "Failed", "ttlSeconds": head}),
    ]


@pytest.mark.parametrize(("seconds", "all_pods"), [(None, 0), (60, 60)])
def test_all_pods_of_a_queued_job_are_deleted_together(
    here: Path, seconds: int | None, all_pods: int
) -> None:
    write_profile(here, ttl_seconds=seconds)
    spec = job_of(here)["spec"]
    ends = (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"])
    assert ends == (True, all_pods) and "deletionStrategy" not in spec


def test_every_pod_passes_pod_security_restricted(here: Path) -> None:
    spec = job_of(here)["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for template in [spec["submitterPodTemplate"], *(g["template"] for g in groups)]:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["imagePullSecrets"] == [{"name": "login"}]
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        # The root is read-only, so writable paths must be volumes.
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        home = {e["name"]: e.get("value") for e in container["env"]}["HOME"]
        assert "emptyDir" in mounts["/tmp"] and "emptyDir" in mounts[str(home)]
        assert {next(k for k in v if k != "name") for v in pod["volumes"]} <= {
            *("emptyDir", "configMap", "persistentVolumeClaim")
        }


def test_names_are_valid_for_the_operator() -> None:
    for recipe in ("small", "9-lives", "a.b_c", "x" * 80, "long-" * 12, "7"):
        name = job_name(recipe)
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47, name
    assert job_name("small") != job_name("small")


def test_keys_reach_the_pods_by_reference_only(here: Path) -> None:
    job = job_of(here)
    container = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"][
        "containers"
    ][0]
    [key] = [e for e in container["env"] if e["name"] == "JUDGE_KEY"]
    assert key == {
        "name": "JUDGE_KEY",
        "valueFrom": {"secretKeyRef": {"name": "keys", "key": "judge"}},
    }


def test_every_ray_pod_mounts_the_claim_as_its_storage(here: Path) -> None:
    pods = ray_pods(here)
    assert len(pods) == 3
    for pod in pods:
        [mount] = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "storage"]
        assert mount == {"name": "storage", "mountPath": "/mnt/zephyr"}
        [volume] = [v for v in pod["volumes"] if v["name"] == "storage"]
        assert volume == {"name": "storage", "persistentVolumeClaim": {"claimName": "shared"}}


@pytest.mark.parametrize("address", ["http://mlflow:5000", None])
def test_every_ray_pod_has_the_profiles_mlflow_address(here: Path, address: str | None) -> None:
    write_profile(here, mlflow=address)
    for pod in ray_pods(here):
        variables = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        assert variables.get("MLFLOW_TRACKING_URI") == address


def test_all_pods_carry_the_labels_that_network_policies_select_and_admit(here: Path) -> None:
    spec = job_of(here)["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [spec["submitterPodTemplate"], *(group["template"] for group in groups)]
    admitted = {"zephyr-ray/client": "true"}
    assert [template["metadata"]["labels"] for template in templates] == [
        {**admitted, "zephyr-ray/part": "submitter"},
        *[{**admitted, "zephyr-ray/part": "pipeline"}] * 3,
    ]


def test_every_empty_dir_has_a_limit(here: Path) -> None:
    submitter = job_of(here)["spec"]["submitterPodTemplate"]["spec"]
    for pod, tmp in [(submitter, "1Gi"), *((pod, "50Gi") for pod in ray_pods(here))]:
        sizes = {v["name"]: v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v}
        assert sizes == {"tmp": {"sizeLimit": tmp}, "home": {"sizeLimit": "10Gi"}}


def test_every_ray_pod_knows_its_job(here: Path) -> None:
    for pod in ray_pods(here):
        assert {"name": "ZEPHYR_JOB", "value": "small-abcde"} in pod["containers"][0]["env"]


def test_cpus_are_counted_per_worker_and_rounded_up(here: Path) -> None:
    workers = {
        "small": {"cpu": "500m", "memory": "1Gi", "replicas": 3},
        "large": {"cpu": 1.5, "memory": "1Gi", "replicas": 2},
    }
    write_profile(here, workers=workers)
    assert load(here / "zephyr-cluster.yaml").cpus == 7  # 3 × 1 + 2 × 2


def test_files_with_the_same_name_stay_apart(here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "train.jsonl").write_text("other\n")
    more = "  more: {kind: prompts, seeds: other/train.jsonl, count: 1}\n"
    path = here / "small.yaml"
    path.write_text(RECIPE + more)
    recipe = recipes.load(path, pipeline.KINDS)
    files = bundle.bundle(recipe_file.read(path, [])[0], recipe, "/mnt/zephyr", path)
    sent = yaml.safe_load(files["recipe.yaml"])["stages"]
    assert files[sent["more"]["seeds"]] == b"other\n"
    assert files[sent["prompts"]["seeds"]] == (here / "seeds" / "train.jsonl").read_bytes()


def test_a_folder_does_not_fit_into_the_config_map(here: Path) -> None:
    (here / "votes").mkdir()
    path = here / "small.yaml"
    path.write_text(RECIPE + "  votes: {kind: votes, file: votes}\n")
    recipe = recipes.load(path, pipeline.KINDS)
    with pytest.raises(Permanent, match="votes is a folder, which a ConfigMap cannot hold; copy"):
        bundle.bundle(recipe_file.read(path, [])[0], recipe, "/mnt/zephyr", path)


def test_a_profile_sets_user_labels_and_service_account_of_all_pods(here: Path) -> None:
    write_profile(
        here,
        user={"id": 7, "group": 8},
        labels={"cost-center": "4711"},
        env={"HF_HUB_OFFLINE": "1"},
        service_account="trainer",
        priority_class="training",
    )
    job = job_of(here)
    assert crd_errors("rayjobs", job) == []
    assert job["metadata"]["labels"]["cost-center"] == "4711"
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for template in [spec["submitterPodTemplate"], *(group["template"] for group in groups)]:
        assert template["metadata"]["labels"]["cost-center"] == "4711"
        pod = template["spec"]
        assert (pod["serviceAccountName"], pod["priorityClassName"]) == ("trainer", "training")
        security = pod["securityContext"]
        ids = [security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")]
        assert ids == [7, 8, 8] and security["runAsNonRoot"]
    for pod in ray_pods(here):
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in pod["containers"][0]["env"]


def test_without_a_user_the_cluster_chooses_it(here: Path) -> None:
    """OpenShift rejects every user and group outside the namespace's range."""
    path = here / "zephyr-cluster.yaml"
    path.write_text(path.read_text() + "user: null\n")
    submitter = job_of(here)["spec"]["submitterPodTemplate"]["spec"]
    for pod in [submitter, *ray_pods(here)]:
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & pod["securityContext"].keys()
