"""`zephyr doctor` on a cluster that is fit, and on each one that is not."""

import json
import re
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_lab import TEAM, write_profile
from kube_api import TOKEN, Api, Fault

from zephyr_ray import cli
from zephyr_ray.cluster import profile_checks

SEARCH = "/api/2.0/mlflow/experiments/search"


def healthy(api: Api) -> None:
    """A cluster that is fit for the profile and the recipe of these tests."""
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.put(TEAM, {"metadata": {"name": "team", "labels": enforced}})
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
    api.proxies["mlflow:5000"] = lambda path, _: (200 if path.startswith(SEARCH) else 404, "{}")
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
        r"✓ +namespace +team, Pod Security restricted;",
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
    "no namespace": (gone(TEAM), r"✗ +namespace +no namespace team +kubectl create namespace"),
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
    "MLflow unseen": (
        lambda api: api.forbidden.add("/services/mlflow:5000"),
        r"– +MLflow +not allowed: ",
    ),
    "an MLflow of others": (
        lambda api: api.proxies.update({"mlflow:5000": lambda path, _: (401, "who are you")}),
        r"✗ +MLflow +http://mlflow:5000 wants an account.*MLFLOW_TRACKING_USERNAME",
    ),
    "something else than MLflow": (
        lambda api: api.proxies.update({"mlflow:5000": lambda path, _: (404, "not found")}),
        r"✗ +MLflow +http://mlflow:5000: not found",
    ),
    "an MLflow behind a network policy": (
        lambda api: api.faults.append(
            Fault("GET", "mlflow:5000", 503, message="error trying to reach service: i/o timeout")
        ),
        r"– +MLflow +.*trying to reach service.* a network policy may keep the API server out",
    ),
    "lists without lists": (
        lambda api: api.faults.append(Fault("GET", "nodes", 200, message='{"items": {}}')),
        r"✗ +nodes +\S+ does not answer as a Kubernetes API server",
    ),
    "odd objects": (
        lambda api: api.put("/api/v1/nodes/odd", {"metadata": {"name": "odd"}, "status": []}),
        r"– +nodes +an answer of an unknown form",
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
    ill: Callable[[Api], None],
    line: str,
) -> None:
    healthy(api)
    ill(api)
    told = examined(capsys, code=1 if line.startswith("✗") else 0)
    assert re.search(line, told), told
    wrong = [row for row in told.splitlines() if row.startswith(("✗", "–"))]
    # Without KubeRay there are no Ray clusters to look at either.
    assert len(wrong) == (2 if "no rayclusters" in line else 1), told


def test_doctor_needs_no_recipe_and_no_secrets(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    write_profile(here, secrets=None, mlflow=None)
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"✓ +secrets +none needed", told)
    write_profile(here, secrets=None)
    told = examined(capsys, code=1)
    assert re.search(r"✗ +secrets +the recipe reads JUDGE_KEY, the profile has no secret", told)


def test_doctor_without_a_valid_token_says_so(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    (here / "kubeconfig").write_text(api.kubeconfig({"token": "old"}))
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
    monkeypatch.setattr(profile_checks, "POLL_SECONDS", 0.05)
    healthy(api)
    kept = api.put

    def put(path: str, found: dict[str, Any], kind: str = "") -> dict[str, Any]:
        is_pod = "/pods/zephyr-pull" in path and kind != "DELETED"
        return kept(path, found | {"status": status} if is_pod else found, kind)

    api.put = put  # type: ignore[method-assign]  # the kubelet's part
    assert re.search(line, examined(capsys, "--pull", code=code))
    containers = [made.body["spec"]["containers"][0] for made in api.asked("POST", "pods$")]
    assert [c["image"].rpartition(":")[2] for c in containers] == ["1.0", "1.0-gpu"]
    assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in containers)
    assert not [path for path in api.objects if "/pods/zephyr-pull" in path]
