"""Tests `zephyr submit`: its requests to the Kubernetes API, and its error lines."""

import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_lab import JOBS, RECIPE, TEAM, created_job, error, write_profile
from kube_api import TOKEN, Api, Fault

from zephyr_ray import cli, pipeline
from zephyr_ray import recipe as recipes
from zephyr_ray.cluster import bundle, command, kube
from zephyr_ray.plan import make_plan
from zephyr_ray.store import Store


def test_the_recipe_that_is_sent_is_the_recipe_that_was_checked(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    """The sent recipe, with extends, --set and files applied, gives every stage the same key."""
    more = "extends: small.yaml\nname: more\nstages:\n  prompts: "
    more += "{kind: prompts, seeds: seeds/train.jsonl, count: 1}\n"
    (here / "more.yaml").write_text(more)
    assert cli.main(["submit", "more.yaml", "--set", "answers.max_tokens=9"]) == 0
    name = created_job(api)["metadata"]["name"]
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


def test_the_job_owns_the_config_map(api: Api, here: Path) -> None:
    assert cli.main(["submit", "small.yaml"]) == 0
    job = created_job(api)
    sent = api.objects[f"{TEAM}/configmaps/{job['metadata']['name']}"]
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    assert sent["metadata"]["ownerReferences"] == [
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": uid}
    ]
    mounted = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "recipe", "configMap": {"name": job["metadata"]["name"]}} in mounted


def test_a_dry_run_prints_what_a_submit_sends(
    api: Api, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "job_name", lambda recipe: f"{recipe}-aaaaa")
    with monkeypatch.context() as without_cluster:
        without_cluster.setenv("KUBECONFIG", str(here / "none"))
        assert cli.main(["submit", "small.yaml", "--dry-run"]) == 0
    assert not api.requests
    output = capsys.readouterr().out
    assert "\n  recipe.yaml: |\n    " in output and "&id" not in output
    printed = list(yaml.safe_load_all(output))
    assert cli.main(["submit", "small.yaml"]) == 0
    sent = [created_job(api), api.objects[f"{TEAM}/configmaps/small-aaaaa"]]
    for one, other in zip(printed, sent, strict=True):
        assert one.pop("metadata") == {
            key: value
            for key, value in (other["metadata"] | {"namespace": "team"}).items()
            if key in ("name", "labels", "namespace")
        }
        assert one == {key: other[key] for key in one}


def test_a_dry_run_has_nothing_to_follow(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    line = error(capsys, "submit", "small.yaml", "--dry-run", "--follow")
    assert line == "error: --dry-run creates no job; remove --wait and --follow\n"
    write_profile(here, image=None)
    assert "setting 'image' is missing" in error(capsys, "submit", "small.yaml", "--dry-run")


@pytest.mark.parametrize("fails", ["POST rayjobs", "POST configmaps"])
def test_a_submit_that_fails_half_way_leaves_nothing(
    api: Api, here: Path, capsys: pytest.CaptureFixture, fails: str
) -> None:
    method, resource = fails.split()
    api.faults = [Fault(method, resource, 403, message="exceeded quota: gpus")]
    assert "exceeded quota: gpus" in error(capsys, "submit", "small.yaml")
    assert not [p for p in api.objects if p.startswith((f"{JOBS}/", f"{TEAM}/configmaps/"))]


def test_a_job_created_without_an_answer_is_deleted(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    """The connection breaks after the server created the RayJob, whose name is never shown."""
    api.faults = [Fault("ANSWER", "rayjobs", "drop")]
    assert "the connection broke" in error(capsys, "submit", "small.yaml", code=1)
    [request] = api.sent("DELETE", "rayjobs/")
    assert request.path not in api.objects
    assert not [p for p in api.objects if p.startswith(f"{TEAM}/configmaps/")]


def test_an_outage_that_ends_soon_leaves_no_incomplete_job(
    api: Api, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CLEAN_UP_PAUSES", (0.01, 0.01))
    api.faults = [Fault("POST", "configmaps", "drop"), Fault("DELETE", "rayjobs", 503, times=2)]
    error(capsys, "submit", "small.yaml", code=1)
    assert len(api.sent("DELETE", "rayjobs/")) == 3
    assert not [p for p in api.objects if p.startswith(f"{JOBS}/")]


@pytest.mark.parametrize("taken", ["configmaps", "rayjobs"])
def test_an_object_of_someone_else_under_the_same_name_stays(
    api: Api, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    monkeypatch.setattr(command, "job_name", lambda recipe: "small-aaaaa")
    path = {"configmaps": f"{TEAM}/configmaps", "rayjobs": JOBS}[taken] + "/small-aaaaa"
    api.put(path, {"metadata": {"name": "small-aaaaa", "uid": "of another"}})
    assert "already exists" in error(capsys, "submit", "small.yaml")
    assert api.objects[path]["metadata"]["uid"] == "of another"
    assert [p for p in api.objects if p.endswith("small-aaaaa")] == [path]


# Mistakes: one line, before any request


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"image": None}, "setting 'image' is missing"),
        ({"imgae": "x"}, "unknown setting 'imgae'; did you mean 'image'"),
        (
            {"workers": {"gpu": {"cpu": 1, "memory": "1Gi", "gpus": 2}}},
            "unknown setting 'workers.gpu.gpus'; did you mean 'gpu'?",
        ),
        (
            {"workers": {"gpu": {"cpu": 1, "memory": "1Gi", "gpu": {"number": 2}}}},
            "unknown setting 'workers.gpu.gpu.number'; known: count, kind",
        ),
        (
            {"head": {"cpu": 1, "memory": "4Gi", "tolerations": [{"efect": "NoSchedule"}]}},
            "unknown setting 'head.tolerations.0.efect'; did you mean 'effect'?",
        ),
        ({"user": {"uid": 1}}, "unknown setting 'user.uid'; did you mean 'id'?"),
        ({"workers": {"GPU": {"cpu": 1, "memory": "1Gi"}}}, "workers.GPU"),
        ({"workers": {}}, "setting 'workers'"),
        ({"workers": {"w": {"cpu": 0, "memory": "1Gi"}}}, "workers.w.cpu"),
        ({"workers": {"w": {"cpu": 1, "memory": "lots"}}}, "workers.w.memory"),
        ({"workers": {"w": {"cpu": 1, "memory": "1Gi", "replicas": 0}}}, "workers.w.replicas"),
        (
            {"workers": {"w": {"cpu": 1, "memory": "1Gi", "gpu": {"kind": "a100", "count": 1}}}},
            "workers.w.gpu.kind",
        ),
        ({"head": {"cpu": 1, "memory": "2Gi"}}, "head.memory is 2Gi; set it to 4Gi or more"),
        ({"mlflow": "http://mlflow:99999"}, "mlflow"),
        (
            {"workers": {"w": {"cpu": 1, "memory": "8GB"}}},
            "'8GB' is invalid; write it like 8Gi",
        ),
        ({"mlflow": "http://me:secret@mlflow"}, "without user or password"),
        (
            {"secrets": {"RAY_AUTH_TOKEN": {"name": "a", "key": "b"}}},
            "the job itself sets RAY_AUTH_TOKEN",
        ),
        ({"workers": {"head": {"cpu": 1, "memory": "1Gi"}}}, "workers.head: Kueue uses this name"),
        ({"env": {"HOME": "/x"}}, "env: the job itself sets HOME; remove it"),
        ({"env": {"JUDGE_KEY": "x"}}, "env: JUDGE_KEY is a secret, which would be stored"),
        (
            {"env": {"R": "x"}, "secrets": {"R": {"name": "a", "key": "b"}}},
            "R is in env and in secrets; remove one",
        ),
        ({"labels": {"zephyr-ray/part": "x"}}, "select pods by zephyr-ray/part; rename it"),
        ({"labels": {"a b": "c"}}, "'a b: c' is not a label"),
        ({"user": {"id": 0}}, "setting 'user.id'"),
        ({"secrets": {"a-b": {"name": "a", "key": "b"}}}, "not a valid variable name"),
        ({"secrets": {}}, "secrets lacks JUDGE_KEY, which model 'judge' reads; add JUDGE_KEY: "),
        ({"namespace": "Team A"}, "setting 'namespace'"),
        ({"backoff_limit": 101}, "setting 'backoff_limit'"),
        (
            {"workers": {f"g{n}": {"cpu": 1, "memory": "1Gi"} for n in range(8)}},
            "8 worker groups, but Kueue accepts at most 7; remove worker groups or the queue",
        ),
    ],
)
def test_a_profile_mistake_is_one_line_and_no_request(
    api: Api, here: Path, capsys: pytest.CaptureFixture, change: dict[str, Any], line: str
) -> None:
    write_profile(here, **change)
    output = error(capsys, "submit", "small.yaml")
    assert line in output and "zephyr-cluster.yaml" in output
    assert not api.requests


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("count: 2", "cuont: 2", "unknown setting 'cuont'; did you mean 'count'"),
        ("seeds/train.jsonl", "seeds/none.jsonl", "none.jsonl"),
        ("name: small", "name: small\nstorage: /data/runs", "not on the cluster's storage"),
        ("name: small", "name: small\nstorage: ../runs", "not on the cluster's storage"),
        ("name: small", "name: small\nstorage: /mnt/zephyr/../x", "not on the cluster's storage"),
        ("weights: owner/tiny", "weights: tiny", "not a hub id"),
        ("weights: owner/tiny", "weights: seeds", "is a folder on this machine"),
    ],
)
def test_a_recipe_mistake_is_one_line_and_no_request(
    api: Api, here: Path, capsys: pytest.CaptureFixture, old: str, new: str, line: str
) -> None:
    (here / "small.yaml").write_text(RECIPE.replace(old, new))
    assert line in error(capsys, "submit", "small.yaml")
    assert not api.requests


def test_an_unknown_context_names_the_known_ones(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    write_profile(here, context="nowhere")
    output = error(capsys, "submit", "small.yaml")
    assert "the kubeconfig has no context 'nowhere'; use lab" in output
    assert not api.requests


def test_more_gpus_than_the_profile_has_are_refused(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    (here / "small.yaml").write_text(RECIPE.replace("owner/tiny", "owner/tiny, gpus: 8"))
    assert cli.main(["submit", "small.yaml"]) == 0  # two pods have four each
    sent = len(api.requests)
    (here / "small.yaml").write_text(RECIPE.replace("owner/tiny", "owner/tiny, gpus: 9"))
    output = error(capsys, "submit", "small.yaml")
    assert "stage 'answers' needs 9 GPUs, zephyr-cluster.yaml has 8" in output
    assert len(api.requests) == sent


def test_more_cpus_than_the_profile_has_are_refused(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    more = "  dialogues: {kind: self_refine, model: base, prompts: prompts}\n"
    more += "  sft: {kind: sft, model: base, data: dialogues, global_batch: 20, workers: 5, "
    more += "cpus_per_worker: CPUS}\n"
    (here / "small.yaml").write_text(RECIPE + more.replace("CPUS", "4"))
    assert cli.main(["submit", "small.yaml"]) == 0  # uses all 20: one worker has 4, two have 8
    sent = len(api.requests)
    (here / "small.yaml").write_text(RECIPE + more.replace("CPUS", "5"))
    line = error(capsys, "submit", "small.yaml")
    assert "stage 'sft'" in line and "25 CPUs" in line and "zephyr-cluster.yaml has 20" in line
    assert len(api.requests) == sent


def test_too_large_files_are_rejected_with_advice(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    line = json.dumps({"instruction": "Name a thing. " * 40}) + "\n"
    (here / "seeds" / "train.jsonl").write_text(line * (1024**2 // len(line) + 1))
    output = error(capsys, "submit", "small.yaml")
    assert "a ConfigMap holds 1" in output and "train.jsonl to the cluster's storage" in output
    assert not api.requests


def test_an_absolute_path_names_a_file_on_the_cluster(api: Api, here: Path) -> None:
    (here / "small.yaml").write_text(RECIPE.replace("seeds/train", "/mnt/zephyr/train"))
    assert cli.main(["submit", "small.yaml"]) == 0
    sent = api.objects[f"{TEAM}/configmaps/{created_job(api)['metadata']['name']}"]
    assert set(sent["data"]) == {"recipe.yaml"}
    assert "seeds: /mnt/zephyr/train.jsonl" in sent["data"]["recipe.yaml"]


def test_binary_files_go_into_binary_data() -> None:
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x", "uid": "1"}}
    document = bundle.config_map("x", {"recipe.yaml": b"a: 1", "0-x.bin": b"\xff\x00"}, owner)
    assert (document["data"], document["binaryData"]) == (
        {"recipe.yaml": "a: 1"},
        {"0-x.bin": "/wA="},
    )


def test_a_missing_profile_or_kubeconfig_is_one_line(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "zephyr-cluster.yaml").rename(here / "other.yaml")
    assert "zephyr-cluster.yaml is missing; write one" in error(capsys, "submit", "small.yaml")
    monkeypatch.setenv("KUBECONFIG", str(here / "nothing"))
    output = error(capsys, "submit", "small.yaml", "--profile", "other.yaml")
    assert "no Kubernetes cluster is configured" in output


@pytest.mark.parametrize("absolute", [False, True])
def test_demonstrations_beside_the_recipe_are_checked(
    absolute: bool, api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    (here / "shown.jsonl").write_text('{"x": 1}\n')
    models = "models: {more: {weights: smollm2-135m-instruct, demonstrations: shown.jsonl}}\n"
    (here / "more.yaml").write_text(f"extends: small.yaml\n{models}")
    output = error(capsys, "submit", str(here / "more.yaml") if absolute else "more.yaml")
    assert "shown.jsonl line 1: needs an" in output


# Rejected by the API


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (Fault("POST", "configmaps", 401, times=2), 2, "does not accept these credentials"),
        (Fault("POST", "rayjobs", 403, message="admission says no"), 2, "admission says no"),
        (Fault("POST", "configmaps", 409, message='"x" already exists'), 2, "already exists"),
        (Fault("POST", "rayjobs", 422, message="spec.entrypoint: Invalid"), 2, "Invalid"),
        (Fault("POST", "rayjobs", 500, message="etcd is away"), 1, "etcd is away; try again"),
        (Fault("POST", "rayjobs", "hang"), 1, "timed out"),
        (Fault("POST", "rayjobs", "drop"), 1, "the connection broke"),
    ],
)
def test_a_rejection_is_one_line(
    api: Api,
    here: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    code: int,
    line: str,
) -> None:
    if fault.action == "hang":
        monkeypatch.setattr(kube, "READ_SECONDS", 0.3)
    api.faults = [fault]
    output = error(capsys, "submit", "small.yaml", code=code)
    assert line in output and TOKEN not in output


def test_a_cluster_without_kuberay_names_the_command(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    del api.objects["/apis/ray.io/v1"]
    output = error(capsys, "submit", "small.yaml")
    assert "install the KubeRay operator (helm install kuberay-operator" in output
    assert "KubeRay operator" in error(capsys, "status", "x")


def test_an_unreachable_server_is_one_line(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    api.close()
    assert "cannot reach http://127.0.0.1" in error(capsys, "status", code=1)


def test_a_deferred_read_is_repeated(api: Api, here: Path) -> None:
    api.faults = [Fault("GET", "rayjobs", 429, headers={"Retry-After": "0"})]
    assert cli.main(["status"]) == 0
    assert len(api.sent("GET", "rayjobs")) == 2


def test_an_unknown_job_is_one_line(api: Api, here: Path, capsys: pytest.CaptureFixture) -> None:
    for word in ("status", "logs", "stop"):
        assert "no job nope in team; list the jobs with zephyr status" in error(
            capsys, word, "nope"
        )


# Reaching the API


def certificate(folder: Path) -> Path:
    """Writes a self-signed certificate for 127.0.0.1 and its key to one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab")])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    issued = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(private + issued.public_bytes(pem))
    return path


def test_only_the_kubeconfigs_authority_is_trusted(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    pem = certificate(here)
    api = Api(pem)
    try:
        api.objects["/apis/ray.io/v1"] = {"resources": []}
        (here / "kubeconfig").write_text(api.kubeconfig(authority=str(pem)))
        assert cli.main(["status"]) == 0
        (here / "kubeconfig").write_text(api.kubeconfig())
        assert "its certificate is not trusted" in error(capsys, "status")
    finally:
        api.close()


def test_a_tls_connection_that_is_cut_off_is_temporary(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    """A load balancer does this while its API server restarts; --follow must then go on."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def cut_off() -> None:
            with server.accept()[0] as connection:
                connection.recv(5000)

        threading.Thread(target=cut_off, daemon=True).start()
        api.address = f"https://127.0.0.1:{server.getsockname()[1]}"
        (here / "kubeconfig").write_text(api.kubeconfig())
        assert f"cannot reach {api.address} (EOF occurred" in error(capsys, "status", code=1)


def test_a_refusal_by_a_service_behind_the_proxy_does_not_renew_the_token(
    api: Api, here: Path
) -> None:
    """The service needs its own credentials; an exec plugin might ask the user to log in again."""
    api.proxies["mlflow:5000"] = lambda path, headers: (401, "who are you")
    with pytest.raises(kube.Unauthorized):
        kube.Kube().get(f"{TEAM}/services/mlflow:5000/proxy/")
    assert len(api.requests) == 1


def test_a_token_may_come_from_a_plugin_of_the_kubeconfig(api: Api, here: Path) -> None:
    """Cloud providers work this way."""
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": TOKEN},
    }
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "echo",
        "args": [json.dumps(credential)],
        "interactiveMode": "Never",
    }
    (here / "kubeconfig").write_text(api.kubeconfig({"exec": plugin}))
    assert cli.main(["status"]) == 0


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
