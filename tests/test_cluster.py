"""Recipes as RayJobs: what is sent to a Kubernetes API, and what is made of its answers."""

import copy
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from crds import crd_schema
from kube_api import TOKEN, Api, Fault

from zephyr_ray import cli, pipeline
from zephyr_ray import recipe as recipes
from zephyr_ray.cluster import bundle, checks, kube, logs, profile, watch
from zephyr_ray.cluster.job import job_name, ray_job
from zephyr_ray.plan import make_plan
from zephyr_ray.store import Store

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
    assert not api.operator_error


@pytest.fixture
def here(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, a profile and a kubeconfig, and short pauses."""
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
    monkeypatch.setattr(kube, "READ_SECONDS", 2.0)
    return tmp_path


def write_profile(folder: Path, **changes: Any) -> None:
    changed = {k: v for k, v in (PROFILE | changes).items() if v is not None}
    (folder / "zephyr-cluster.yaml").write_text(yaml.safe_dump(changed))


def ends(api: Api, name: str, job: str = "SUCCEEDED", **status: Any) -> None:
    deployment = "Failed" if job == "FAILED" else "Complete"
    api.status(name, jobDeploymentStatus=deployment, jobStatus=job, **status)


def made_job(api: Api) -> dict[str, Any]:
    [found] = [o for path, o in api.objects.items() if path.startswith(f"{JOBS}/")]
    return found


def error(capsys: pytest.CaptureFixture, *command: str, code: int = 2) -> str:
    """The one line that a command ends with."""
    assert cli.main(list(command)) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


# What is sent


def test_the_job_is_one_that_kuberays_schema_takes(here: Path) -> None:
    job = ray_job("small-abcde", profile.load(here / "zephyr-cluster.yaml"))
    jsonschema.validate(job, crd_schema("rayjobs"))


def test_the_strict_schema_tells_a_misspelt_field(here: Path) -> None:
    job = ray_job("small-abcde", profile.load(here / "zephyr-cluster.yaml"))
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(job, crd_schema("rayjobs"))


def test_what_the_operator_checks_holds(here: Path) -> None:
    job = ray_job("small-abcde", profile.load(here / "zephyr-cluster.yaml"))
    spec = job["spec"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 600)
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (2, 3600)
    assert shlex.split(spec["entrypoint"]) == [
        *("python", "-m", "zephyr_ray.pipeline", "/etc/zephyr/recipe.yaml")
    ]
    cluster = spec["rayClusterSpec"]
    assert (cluster["authOptions"], cluster["rayVersion"]) == ({"mode": "token"}, "2.60.0")
    head, (cpu, gpu) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, cpu, gpu):
        assert "resources" not in group  # either these or rayStartParams; limits say it all
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
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]


def test_every_pod_passes_pod_security_restricted(here: Path) -> None:
    spec = ray_job("small-abcde", profile.load(here / "zephyr-cluster.yaml"))["spec"]
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
        # The root is read-only: what is written to is a volume.
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        home = {e["name"]: e.get("value") for e in container["env"]}["HOME"]
        assert "emptyDir" in mounts["/tmp"] and "emptyDir" in mounts[str(home)]
        assert {next(k for k in v if k != "name") for v in pod["volumes"]} <= {
            *("emptyDir", "configMap", "persistentVolumeClaim")
        }


def test_names_are_what_the_operator_takes() -> None:
    for recipe in ("small", "9-lives", "a.b_c", "x" * 80, "long-" * 12, "7"):
        name = job_name(recipe)
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47, name
    assert job_name("small") != job_name("small")


def test_keys_reach_the_pods_by_reference_only(here: Path) -> None:
    job = ray_job("small-abcde", profile.load(here / "zephyr-cluster.yaml"))
    container = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"][
        "containers"
    ][0]
    [key] = [e for e in container["env"] if e["name"] == "JUDGE_KEY"]
    assert key == {
        "name": "JUDGE_KEY",
        "valueFrom": {"secretKeyRef": {"name": "keys", "key": "judge"}},
    }


def test_the_recipe_that_travels_is_the_recipe_that_was_checked(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    """With what it extends, --set and its files; every stage keeps its key."""
    more = "extends: small.yaml\nname: more\nstages:\n  prompts: "
    more += "{kind: prompts, seeds: seeds/train.jsonl, count: 1}\n"
    (here / "more.yaml").write_text(more)
    assert cli.main(["submit", "more.yaml", "--set", "answers.max_tokens=9"]) == 0
    name = made_job(api)["metadata"]["name"]
    assert f"job       {name} in team" in capsys.readouterr().out
    sent = api.objects[f"{TEAM}/configmaps/{name}"]
    there = here / "pod"
    there.mkdir()
    for file, content in sent["data"].items():
        (there / file).write_text(content)
    here_recipe = recipes.load(here / "more.yaml", pipeline.KINDS, ["answers.max_tokens=9"])
    pod_recipe = recipes.load(there / "recipe.yaml", pipeline.KINDS)
    assert pod_recipe.name == "more" and str(pod_recipe.storage) == "/mnt/zephyr/runs"
    store = Store(here / "runs")
    keys = [[step.key for step in make_plan(r, store)] for r in (here_recipe, pod_recipe)]
    assert keys[0] == keys[1] and len(keys[0]) == 3


def test_the_config_map_is_the_jobs_and_goes_with_it(api: Api, here: Path) -> None:
    assert cli.main(["submit", "small.yaml"]) == 0
    job = made_job(api)
    sent = api.objects[f"{TEAM}/configmaps/{job['metadata']['name']}"]
    [owner] = sent["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("RayJob", job["metadata"]["uid"])
    mounted = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "recipe", "configMap": {"name": job["metadata"]["name"]}} in mounted


@pytest.mark.parametrize("fails", ["POST rayjobs", "PATCH configmaps"])
def test_a_submit_that_fails_half_way_leaves_nothing(
    api: Api, here: Path, capsys: pytest.CaptureFixture, fails: str
) -> None:
    method, what = fails.split()
    api.faults = [Fault(method, what, 403, message="exceeded quota: gpus")]
    assert "exceeded quota: gpus" in error(capsys, "submit", "small.yaml")
    assert not [p for p in api.objects if p.startswith((f"{JOBS}/", f"{TEAM}/configmaps/"))]


# What is wrong is one line, before any request


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"image": None}, "setting 'image' is missing"),
        ({"imgae": "x"}, "unknown setting 'imgae'; did you mean 'image'"),
        ({"workers": {"gpu": {"cpu": 1, "memory": "1Gi", "gpus": 2}}}, "unknown setting"),
        ({"workers": {"GPU": {"cpu": 1, "memory": "1Gi"}}}, "workers.GPU"),
        ({"workers": {}}, "setting 'workers'"),
        ({"workers": {"w": {"cpu": 0, "memory": "1Gi"}}}, "workers.w.cpu"),
        ({"workers": {"w": {"cpu": 1, "memory": "lots"}}}, "workers.w.memory"),
        ({"workers": {"w": {"cpu": 1, "memory": "1Gi", "replicas": 0}}}, "workers.w.replicas"),
        (
            {"workers": {"w": {"cpu": 1, "memory": "1Gi", "gpu": {"kind": "a100", "count": 1}}}},
            "workers.w.gpu.kind",
        ),
        ({"head": {"cpu": 1, "memory": "2Gi"}}, "the head needs at least 4Gi"),
        ({"mlflow": "http://me:secret@mlflow"}, "without user or password"),
        ({"secrets": {"RAY_AUTH_TOKEN": {"name": "a", "key": "b"}}}, "set by the job itself"),
        ({"secrets": {"a-b": {"name": "a", "key": "b"}}}, "no name of an environment variable"),
        ({"secrets": {}}, "reads JUDGE_KEY; add under secrets"),
        ({"namespace": "Team A"}, "setting 'namespace'"),
        (
            {"workers": {f"g{n}": {"cpu": 1, "memory": "1Gi"} for n in range(8)}},
            "8 worker groups; in a queue at most 7",
        ),
    ],
)
def test_a_profile_mistake_is_one_line_and_no_request(
    api: Api, here: Path, capsys: pytest.CaptureFixture, change: dict[str, Any], line: str
) -> None:
    write_profile(here, **change)
    said = error(capsys, "submit", "small.yaml")
    assert line in said and "zephyr-cluster.yaml" in said
    assert not api.requests


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("count: 2", "cuont: 2", "unknown setting 'cuont'; did you mean 'count'"),
        ("seeds/train.jsonl", "seeds/none.jsonl", "none.jsonl"),
        ("name: small", "name: small\nstorage: /data/runs", "not on the cluster's storage"),
        ("weights: owner/tiny", "weights: tiny", "not a hub id"),
        ("weights: owner/tiny", "weights: seeds", "is a folder of this machine"),
    ],
)
def test_a_recipe_mistake_is_one_line_and_no_request(
    api: Api, here: Path, capsys: pytest.CaptureFixture, old: str, new: str, line: str
) -> None:
    (here / "small.yaml").write_text(RECIPE.replace(old, new))
    assert line in error(capsys, "submit", "small.yaml")
    assert not api.requests


def test_too_large_files_are_told_where_to_go(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    line = json.dumps({"instruction": "Name a thing. " * 40}) + "\n"
    (here / "seeds" / "train.jsonl").write_text(line * (1024**2 // len(line) + 1))
    said = error(capsys, "submit", "small.yaml")
    assert "a ConfigMap holds 1" in said and "train.jsonl on the cluster's storage" in said
    assert not api.requests


def test_a_file_by_its_full_path_is_one_of_the_cluster(api: Api, here: Path) -> None:
    (here / "small.yaml").write_text(RECIPE.replace("seeds/train", "/mnt/zephyr/train"))
    assert cli.main(["submit", "small.yaml"]) == 0
    sent = api.objects[f"{TEAM}/configmaps/{made_job(api)['metadata']['name']}"]
    assert set(sent["data"]) == {"recipe.yaml"}
    assert "seeds: /mnt/zephyr/train.jsonl" in sent["data"]["recipe.yaml"]


def test_bytes_that_are_no_text_travel_too() -> None:
    made = bundle.config_map("x", {"recipe.yaml": b"a: 1", "0-x.bin": b"\xff\x00"})
    assert (made["data"], made["binaryData"]) == ({"recipe.yaml": "a: 1"}, {"0-x.bin": "/wA="})


def test_no_profile_and_no_kubeconfig_say_so(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "zephyr-cluster.yaml").rename(here / "other.yaml")
    assert "no zephyr-cluster.yaml here" in error(capsys, "submit", "small.yaml")
    monkeypatch.setenv("KUBECONFIG", str(here / "nothing"))
    said = error(capsys, "submit", "small.yaml", "--profile", "other.yaml")
    assert "no Kubernetes cluster is configured" in said


# What the API refuses


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (Fault("POST", "configmaps", 401), 2, "does not accept these credentials"),
        (Fault("POST", "rayjobs", 403, message="admission says no"), 2, "admission says no"),
        (Fault("POST", "configmaps", 409, message='"x" already exists'), 2, "already exists"),
        (Fault("POST", "rayjobs", 422, message="spec.entrypoint: Invalid"), 2, "Invalid"),
        (Fault("POST", "rayjobs", 500, message="etcd is away"), 1, "etcd is away; try again"),
        (Fault("POST", "rayjobs", "hang"), 1, "timed out"),
        (Fault("POST", "rayjobs", "drop"), 1, "the connection broke"),
    ],
)
def test_a_refusal_is_one_line(
    api: Api,
    here: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr(kube, "READ_SECONDS", 0.3)
    api.faults = [fault]
    said = error(capsys, "submit", "small.yaml", code=code)
    assert line in said and TOKEN not in said


def test_a_cluster_without_kuberay_names_the_command(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    del api.objects["/apis/ray.io/v1"]
    said = error(capsys, "submit", "small.yaml")
    assert "install the KubeRay operator (helm install kuberay-operator" in said
    assert "KubeRay operator" in error(capsys, "status", "x")


def test_a_server_that_is_not_there_is_one_line(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    api.close()
    assert "cannot reach http://127.0.0.1" in error(capsys, "status", code=1)


def test_a_read_that_is_put_off_is_made_again(api: Api, here: Path) -> None:
    api.faults = [Fault("GET", "rayjobs", 429, headers={"Retry-After": "0"})]
    assert cli.main(["status"]) == 0
    assert len(api.asked("GET", "rayjobs")) == 2


def test_an_unknown_job_is_one_line(api: Api, here: Path, capsys: pytest.CaptureFixture) -> None:
    for command in ("status", "logs", "stop"):
        assert "no job nope in team; zephyr status lists them" in error(capsys, command, "nope")


# Following


def lasts(api: Api, name: str) -> None:
    """A run of two stages, as KubeRay would tell of it, once all faults have struck."""
    api.wait_for(lambda: any("watch" in r.query for r in api.requests))
    api.status(name, jobDeploymentStatus="Initializing", rayClusterName=f"{name}-c")
    api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    api.pod("submitter", name)
    api.log("submitter", "12:00:01 prompts: running", "2026-01-01T12:00:01.5Z")
    api.log("submitter", "12:00:02 prompts: done 2 rows", "2026-01-01T12:00:02Z")
    api.wait_for(lambda: bool(api.asked("GET", "submitter/log")))
    api.log("submitter", "12:00:03 answers: done 2 rows", "2026-01-01T12:00:03Z")
    api.wait_for(lambda: not any(fault.times for fault in api.faults))
    api.phase("submitter", "Succeeded")
    ends(api, name)


LOG = [
    "12:00:01 prompts: running",
    "12:00:02 prompts: done 2 rows",
    "12:00:03 answers: done 2 rows",
]


def shown(out: str) -> list[str]:
    """The log lines of a followed job, without the three that name it."""
    return out.splitlines()[3:]


def test_follow_shows_log_and_states_and_ends_with_the_jobs_code(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    api.operator = lasts
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    said = capsys.readouterr()
    assert shown(said.out) == LOG
    states = [line.partition("▸ ")[2] for line in said.err.splitlines()]
    assert states[0] == "waiting for the operator" and states[-1] == "complete, job succeeded"
    assert any(state.startswith("running, job running, on small-") for state in states)


@pytest.mark.parametrize(
    ("job", "status", "code"),
    [
        ("SUCCEEDED", {}, 0),
        ("FAILED", {"message": "Job entrypoint command failed with exit code 2, last"}, 2),
        ("FAILED", {"message": "Job entrypoint command failed with exit code -9, last"}, 137),
        ("FAILED", {"reason": "AppFailed", "message": "the head died"}, 1),
        ("FAILED", {"reason": "DeadlineExceeded"}, 124),
        ("STOPPED", {}, 130),
    ],
)
def test_wait_ends_with_the_jobs_own_code(
    api: Api, here: Path, job: str, status: dict[str, str], code: int
) -> None:
    api.operator = lambda api, name: ends(api, name, job, **status)
    assert cli.main(["submit", "small.yaml", "--wait"]) == code
    assert not api.asked("GET", "/log")


def test_what_the_operator_refuses_ends_the_wait(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    api.operator = lambda api, name: api.status(
        name, jobDeploymentStatus="ValidationFailed", message="name too long"
    )
    assert cli.main(["submit", "small.yaml", "--wait"]) == 2
    assert "validationfailed: name too long" in capsys.readouterr().err


def test_a_job_that_somebody_deletes_ends_the_wait(api: Api, here: Path) -> None:
    def operator(api: Api, name: str) -> None:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        api.put(f"{JOBS}/{name}", api.objects[f"{JOBS}/{name}"], "DELETED")

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 130


def test_follow_goes_on_through_a_retry_on_a_fresh_cluster(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    def operator(api: Api, name: str) -> None:
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        api.pod("first", name, created="2026-01-01T12:00:00Z")
        api.log("first", "one", "2026-01-01T12:00:01Z")
        api.wait_for(lambda: bool(api.asked("GET", "first/log")))
        api.status(name, jobDeploymentStatus="Retrying", jobStatus="", failed=1)
        time.sleep(0.2)
        path = f"{TEAM}/pods/first"
        api.put(path, api.objects[path], "DELETED")
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        api.pod("second", name, created="2026-01-01T12:01:00Z")
        api.log("second", "two", "2026-01-01T12:01:01Z")
        api.phase("second", "Succeeded")
        ends(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    said = capsys.readouterr()
    assert shown(said.out) == ["one", "two"]
    assert "retrying, after 1 failed" in said.err
    assert re.search(r"log of first\n(.*\n)*.*log of second", said.err)


FAULTS = {
    "410 of the watch": [Fault("GET", r"rayjobs\?watch", 410)],
    "watch cut off": [Fault("CUT", "rayjobs", 0, times=2)],
    "watch dropped": [Fault("GET", r"rayjobs\?watch", "drop", times=2)],
    "watch hangs": [Fault("GET", r"rayjobs\?watch", "hang")],
    "reads fail": [Fault("GET", "rayjobs/", 503, times=3)],
    "log cut off": [Fault("CUT", "submitter/log", 0, times=2)],
    "log dropped": [Fault("GET", "submitter/log", "drop", times=2)],
    "log fails": [Fault("GET", "submitter/log", 500, times=2)],
    "pods fail": [Fault("GET", "pods$", 503, times=2)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_follow_survives(
    api: Api,
    here: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    faults: list[Fault],
) -> None:
    """Each line is shown once, whatever breaks meanwhile."""
    monkeypatch.setattr(kube, "READ_SECONDS", 0.3)
    api.faults, api.operator = copy.deepcopy(faults), lasts
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    assert shown(capsys.readouterr().out) == LOG


def test_a_watch_that_is_too_old_is_begun_anew(api: Api, here: Path) -> None:
    """410 as an event in the middle of a watch, which is how a real one tells."""

    def operator(api: Api, name: str) -> None:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        api.oldest = 10**6
        with api.changed:
            api.changed.notify_all()
        api.wait_for(lambda: len(api.asked("GET", f"rayjobs/{name}")) >= 3)
        api.oldest = 0
        ends(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 0


def test_a_token_that_is_taken_back_ends_the_wait_with_one_line(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    api.faults = [Fault("GET", "rayjobs", 401)]
    assert cli.main(["submit", "small.yaml", "--wait"]) == 2
    assert "error: http" in capsys.readouterr().err.splitlines()[-1]


def test_what_holds_a_start_up_is_told_once(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    def operator(api: Api, name: str) -> None:
        involved = {"name": name}
        api.put(
            f"{TEAM}/events/e1",
            {
                "metadata": {"name": "e1"},
                "type": "Warning",
                "involvedObject": involved,
                "reason": "InvalidRayJobSpec",
                "message": "no such field",
            },
        )
        waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
        api.put(
            f"{TEAM}/pods/head",
            {
                "metadata": {"name": "head", "labels": {"ray.io/cluster": "c1"}},
                "status": {
                    "conditions": [
                        {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
                    ],
                    "containerStatuses": [{"state": {"waiting": waiting}}],
                },
            },
        )
        api.status(name, jobDeploymentStatus="Initializing", rayClusterName="c1")
        api.wait_for(lambda: len(api.asked("GET", "events")) >= 2)
        ends(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 0
    said = capsys.readouterr().err
    for line in (
        "InvalidRayJobSpec: no such field",
        "head: ImagePullBackOff: no such image",
        "head is not scheduled: 0/3 nodes",
    ):
        assert said.count(line) == 1, said


def test_lines_of_one_moment_are_told_apart_when_a_log_is_taken_up_again() -> None:
    seen = logs._Seen()
    first = ["2026-01-01T12:00:01.5Z a", "2026-01-01T12:00:01.51Z b", "2026-01-01T12:00:01.51Z b"]
    assert list(seen.only_new(first)) == ["a", "b", "b"]
    again = [*first, "2026-01-01T12:00:01.51Z b", "2026-01-01T12:00:02Z c", "2026-01-01T12:00:02Z "]
    assert list(seen.only_new(again)) == ["b", "c", ""]


@pytest.mark.parametrize(("answer", "left"), [("n", False), ("", True)])
def test_ctrl_c_asks_whether_to_leave_it_running(
    api: Api, here: Path, answer: str, left: bool
) -> None:
    def operator(api: Api, name: str) -> None:
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")

    api.operator = operator
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "zephyr_ray.cli", "submit", "small.yaml", "--wait"],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    try:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests), 30)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        os.write(master, f"{answer}\n".encode())
        said = process.communicate(timeout=20)[0].decode()
    finally:
        process.kill()
        os.close(master)
        os.close(terminal)
    assert process.returncode == 130, said
    assert "running? [Y/n]" in said
    assert bool([p for p in api.objects if p.startswith(f"{JOBS}/")]) is left


# status, logs, stop


def a_job(api: Api, name: str, **status: Any) -> None:
    metadata = {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}
    api.put(f"{JOBS}/{name}", {"metadata": metadata, "spec": {}, "status": status})


def test_status_lists_jobs_and_tells_the_stages_of_one(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    a_job(api, "one", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    a_job(api, "two", jobDeploymentStatus="Running", jobStatus="RUNNING", failed=1)
    assert cli.main(["status"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"one .*complete, job succeeded", listed)
    assert re.search(r"two .*running, job running, after 1 failed", listed)
    api.pod("submitter", "two")
    for second, text in enumerate(
        ("prompts: running", "prompts: done 2 rows", "answers: running 1/2 rows", "noise")
    ):
        api.log("submitter", f"12:00:0{second} {text}", f"2026-01-01T12:00:0{second}Z")
    assert cli.main(["status", "two"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"prompts +done +2 rows", told)
    assert re.search(r"answers +running +1/2 rows", told)


def test_logs_prints_what_there_is(api: Api, here: Path, capsys: pytest.CaptureFixture) -> None:
    a_job(api, "one", jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert "one has no log: running" in error(capsys, "logs", "one")
    api.pod("submitter", "one")
    api.log("submitter", "hello", "2026-01-01T12:00:00Z")
    assert cli.main(["logs", "one"]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_logs_follow_ends_with_the_jobs_code(api: Api, here: Path) -> None:
    a_job(api, "one", jobDeploymentStatus="Failed", jobStatus="FAILED")
    assert cli.main(["logs", "one", "--follow"]) == 1


def test_stop_deletes_the_job_and_what_is_its(api: Api, here: Path) -> None:
    a_job(api, "one")
    assert cli.main(["stop", "one"]) == 0
    [asked] = api.asked("DELETE", "rayjobs/one")
    assert asked.query["propagationPolicy"] == "Background"
    assert f"{JOBS}/one" not in api.objects


def test_without_a_profile_the_kubeconfig_names_the_namespace(api: Api, here: Path) -> None:
    (here / "zephyr-cluster.yaml").unlink()
    (here / "kubeconfig").write_text(api.kubeconfig(namespace="mine"))
    assert cli.main(["status"]) == 0
    assert api.requests[-1].path == "/apis/ray.io/v1/namespaces/mine/rayjobs"


# doctor


def healthy(api: Api) -> None:
    """A cluster that is fit for the profile and the recipe of these tests."""
    api.objects["/version"] = {"major": "1", "minor": "37", "gitVersion": "v1.37.1"}
    container = {"image": "quay.io/kuberay/operator:v1.7.0"}
    api.put(
        "/apis/apps/v1/namespaces/kuberay/deployments/kuberay-operator",
        {
            "metadata": {
                "name": "kuberay-operator",
                "namespace": "kuberay",
                "labels": {"app.kubernetes.io/name": "kuberay-operator"},
            },
            "spec": {"template": {"spec": {"containers": [container]}}},
            "status": {"availableReplicas": 1},
        },
    )
    amounts = {"cpu": "31850m", "memory": "263856352Ki"}
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    for name in ("a", "b"):
        api.put(
            f"/api/v1/nodes/gpu-{name}",
            {
                "metadata": {"name": f"gpu-{name}", "labels": {"pool": "a100"}},
                "spec": {"taints": [taint]},
                "status": {"allocatable": amounts | {"nvidia.com/gpu": "4"}},
            },
        )
    api.put(
        "/api/v1/nodes/cpu",
        {"metadata": {"name": "cpu"}, "status": {"allocatable": amounts}},
    )
    api.put(
        f"{TEAM}/persistentvolumeclaims/shared",
        {
            "metadata": {"name": "shared"},
            "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"},
            "status": {"phase": "Bound"},
        },
    )
    api.put("/apis/storage.k8s.io/v1/storageclasses/nfs", {"metadata": {"name": "nfs"}})
    secret(api, "keys", {"judge": "sk-very-secret"})
    login = json.dumps({"auths": {"registry.example": {"auth": "x"}}})
    secret(api, "login", {".dockerconfigjson": login})
    api.proxies["mlflow:5000"] = lambda path, _: (200 if path == "/health" else 404, "OK")
    ray_cluster(api)


def secret(api: Api, name: str, values: dict[str, str]) -> None:
    data = {key: b64encode(value.encode()).decode() for key, value in values.items()}
    api.put(f"{TEAM}/secrets/{name}", {"metadata": {"name": name}, "data": data})


def ray_cluster(api: Api, guarded: bool = True) -> None:
    """A Ray cluster whose jobs API wants the token of its secret, unless it is left open."""
    secret(api, "demo", {"auth_token": "ray-token"})
    status = {"state": "ready", "head": {"serviceName": "demo-head-svc"}}
    path = "/apis/ray.io/v1/namespaces/team/rayclusters/demo"
    api.put(path, {"metadata": {"name": "demo"}, "status": status})

    def dashboard(path: str, headers: dict[str, str]) -> tuple[int, str]:
        sent = headers.get("x-ray-authorization")
        if guarded and not sent:
            return 401, "Unauthorized: Missing authentication token"
        if guarded and sent != "Bearer ray-token":
            return 403, "Forbidden: Invalid authentication token"
        return 200, "[]"

    api.proxies["demo-head-svc:8265"] = dashboard


def examined(capsys: pytest.CaptureFixture, *arguments: str, code: int) -> str:
    """What doctor says, its table unfolded into one line of words a row."""
    assert cli.main(["doctor", "small.yaml", *arguments]) == code
    return capsys.readouterr().out


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def test_doctor_finds_nothing_wrong_with_a_fit_cluster(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    told = examined(capsys, code=0)
    assert "✗" not in told and "–" not in told.replace(" – ", "")
    for line in (
        r"✓ +versions +http\S+ runs v1.37.1",
        r"✓ +operator +operator kuberay/kuberay-operator is \S+:v1.7.0",
        r"✓ +permissions +all that submit, status, logs and stop need in team",
        r"✓ +nodes +group cpu: 1 × no GPU; empty, the nodes hold [1-9]",
        r"✓ +nodes +group gpu: 2 × 4 nvidia.com/gpu; empty, the nodes hold 2 of",
        r"✓ +storage +claim shared: Bound, ReadWriteMany, class nfs",
        r"✓ +secrets +JUDGE_KEY: secret keys has judge",
        r"✓ +image +pull secret login has a login for registry.example",
        r"✓ +MLflow +http://mlflow:5000 answers",
        r"✓ +Ray +demo: the dashboard answers, wants a token and takes this one",
    ):
        assert re.search(line, told), (line, told)
    assert "sk-very-secret" not in told and "ray-token" not in told and TOKEN not in told


def changed(path: str, **changes: Any) -> Callable[[Api], None]:
    return lambda api: api.objects[path].update(changes)


def gone(path: str) -> Callable[[Api], None]:
    return lambda api: api.objects.pop(path) and None


def small_nodes(api: Api) -> None:
    for name in ("a", "b"):
        api.objects[f"/api/v1/nodes/gpu-{name}"]["status"]["allocatable"]["nvidia.com/gpu"] = "3"


DEPLOYMENT = "/apis/apps/v1/namespaces/kuberay/deployments/kuberay-operator"
OLD = {"spec": {"template": {"spec": {"containers": [{"image": "kuberay/operator:v1.5.1"}]}}}}
CLAIM = f"{TEAM}/persistentvolumeclaims/shared"
ILLS: dict[str, tuple[Callable[[Api], None], str]] = {
    "old server": (
        changed("/version", minor="28+", gitVersion="v1.28.0"),
        r"– +versions .*v1.28.0.* tested with 1.34 to 1.37",
    ),
    "no kinds": (
        gone("/apis/ray.io/v1"),
        r"✗ +operator +no rayclusters and rayjobs in ray.io/v1 +helm install kuberay-operator",
    ),
    "no operator": (gone(DEPLOYMENT), r"✗ +operator .*no operator that acts .*helm install"),
    "operator down": (changed(DEPLOYMENT, status={}), r"✗ +operator .*no running pod +kubectl"),
    "old operator": (changed(DEPLOYMENT, **OLD), r"✗ +operator .*v1.5.1 +helm upgrade"),
    "no right": (
        lambda api: api.denied.update({"create rayjobs", "get pods/log"}),
        r"✗ +permissions +in team you may not create rayjobs, get pods/log +ask for a Role",
    ),
    "tainted": (
        changed("/api/v1/nodes/cpu", spec={"unschedulable": True}),
        r"✗ +nodes +group cpu: .* hold 0 of these",
    ),
    "few GPUs": (
        small_nodes,
        r"✗ +nodes +group gpu: .* hold 0 of these +6 nvidia.com/gpu allocatable in all",
    ),
    "nodes unseen": (
        lambda api: api.forbidden.add("/nodes$"),
        r"– +nodes +not allowed: nodes is forbidden",
    ),
    "no claim": (gone(CLAIM), r"✗ +storage +no claim shared in team +make a ReadWriteMany claim"),
    "one node's claim": (
        changed(CLAIM, spec={"accessModes": ["ReadWriteOnce"], "storageClassName": "nfs"}),
        r"✗ +storage .*ReadWriteOnce.* use a storage class with ReadWriteMany",
    ),
    "unbound": (
        changed(CLAIM, status={"phase": "Pending"}),
        r"✗ +storage +claim shared: Pending.* kubectl describe pvc shared",
    ),
    "no secret": (
        gone(f"{TEAM}/secrets/keys"),
        r"✗ +secrets +JUDGE_KEY: no secret keys in team +kubectl create secret generic keys",
    ),
    "wrong key": (
        lambda api: secret(api, "keys", {"other": "x"}),
        r"✗ +secrets +JUDGE_KEY: secret keys has no judge; it has other",
    ),
    "secrets unseen": (
        lambda api: api.forbidden.add("/secrets/keys"),
        r"– +secrets +not allowed: keys is forbidden",
    ),
    "no login": (gone(f"{TEAM}/secrets/login"), r"✗ +image +no pull secret login in team"),
    "other login": (
        lambda api: secret(api, "login", {".dockerconfigjson": '{"auths": {"quay.io": {}}}'}),
        r"✗ +image +pull secret login is for quay.io, not registry.example",
    ),
    "no MLflow": (
        lambda api: api.proxies.pop("mlflow:5000") and None,
        r"✗ +MLflow +http://mlflow:5000: .*no endpoints available",
    ),
    "open Ray": (
        lambda api: ray_cluster(api, guarded=False),
        r"✗ +Ray +demo: the dashboard answers without a token",
    ),
    "other token": (
        lambda api: secret(api, "demo", {"auth_token": "of-another"}),
        r"✗ +Ray +demo: the dashboard does not take the token",
    ),
    "no Ray": (
        gone("/apis/ray.io/v1/namespaces/team/rayclusters/demo"),
        r"– +Ray +no Ray cluster runs now",
    ),
    "time-out": (
        lambda api: api.faults.append(Fault("GET", "persistentvolumeclaims", "hang")),
        r"✗ +storage +cannot reach \S+ \(timed out\) +try again",
    ),
}


@pytest.mark.parametrize(("ill", "line"), ILLS.values(), ids=ILLS)
def test_doctor_tells_what_is_wrong_and_the_fix(
    api: Api,
    here: Path,
    wide: None,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    ill: Callable[[Api], None],
    line: str,
) -> None:
    monkeypatch.setattr(kube, "READ_SECONDS", 0.5)
    healthy(api)
    ill(api)
    told = examined(capsys, code=1 if line.startswith("✗") else 0)
    assert re.search(line, told), told
    wrong = [row for row in told.splitlines() if row.startswith(("✗", "–"))]
    # Without KubeRay there are no jobs and no clusters to look at either.
    assert len(wrong) == (3 if "no rayclusters" in line else 1), told


def test_doctor_without_a_valid_token_says_so(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    (here / "kubeconfig").write_text(api.kubeconfig(token="old"))
    told = examined(capsys, code=1)
    assert "✓" not in told
    assert "does not accept these credentials; log in again" in told and "old" not in told


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        ({"phase": "Succeeded"}, 0, r"✓ +pull +registry.example/zephyr-ray:1.0 came in"),
        (
            {
                "phase": "Pending",
                "containerStatuses": [
                    {"state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}
                ],
            },
            1,
            r"✗ +pull +registry.example/zephyr-ray:1.0: not found +check image",
        ),
    ],
)
def test_doctor_pulls_the_image_with_a_pod_that_goes_again(
    api: Api,
    here: Path,
    wide: None,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    status: dict[str, Any],
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr(checks, "POLL_SECONDS", 0.05)
    healthy(api)
    kept = api.put

    def put(path: str, found: dict[str, Any], kind: str = "") -> dict[str, Any]:
        is_pod = "/pods/zephyr-pull" in path and kind != "DELETED"
        return kept(path, found | {"status": status} if is_pod else found, kind)

    api.put = put  # type: ignore[method-assign]  # the kubelet's part
    assert re.search(line, examined(capsys, "--pull", code=code))
    [made] = api.asked("POST", "pods$")
    assert made.body["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert not [path for path in api.objects if "/pods/zephyr-pull" in path]


def test_importing_the_commands_does_not_load_the_client() -> None:
    code = (
        "import sys, zephyr_ray.cli, zephyr_ray.cluster.command; print('kubernetes' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert done.stdout == "False\n", done.stderr
