"""Tests `zephyr doctor` on a healthy cluster, and on a cluster with each fault."""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chart_tools import CHART, CLUSTER, kind, render
from cluster_lab import TEAM, write_profile
from kube_api import TOKEN, Api, Fault

from zephyr_ray import cli
from zephyr_ray.cluster import kube, profile_checks
from zephyr_ray.cluster.checks import CheckResult

SEARCH = "/api/2.0/mlflow/experiments/search"


# The head has 2 CPUs and 8 GiB, the submitter 0.5 and 1, the CPU worker 4 and 16, each of two GPU
# workers 8 and 64 and 4 GPUs; together 22.5 CPUs, 153 GiB and 8 GPUs in 5 pods.
HARD = {
    "requests.cpu": "22500m",
    "limits.memory": "153Gi",
    "requests.nvidia.com/gpu": "10",
    "pods": "5",
}
QUEUE = "/apis/kueue.x-k8s.io/v1beta2/namespaces/team/localqueues/research"


def healthy(api: Api) -> None:
    """Sets up a cluster that can run the recipe of these tests."""
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
    api.put(
        f"{TEAM}/resourcequotas/team",
        {
            "metadata": {"name": "team"},
            "spec": {"hard": HARD},
            "status": {"hard": HARD, "used": {"requests.nvidia.com/gpu": "2", "pods": "0"}},
        },
    )
    # A quota whose scope excludes the run's pods.
    api.put(
        f"{TEAM}/resourcequotas/jobs",
        {"metadata": {"name": "jobs"}, "spec": {"scopes": ["Terminating"], "hard": {"pods": "0"}}},
    )
    limits = {"type": "Container", "max": {"memory": "64Gi"}, "min": {"cpu": "100m"}}
    api.put(
        f"{TEAM}/limitranges/sizes",
        {"metadata": {"name": "sizes"}, "spec": {"limits": [limits]}},
    )
    api.objects["/apis/kueue.x-k8s.io"] = {
        "preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}
    }
    active = {"type": "Active", "status": "True"}
    api.put(QUEUE, {"metadata": {"name": "research"}, "status": {"conditions": [active]}})
    api.put("/apis/storage.k8s.io/v1/storageclasses/nfs", {"metadata": {"name": "nfs"}})
    secret(api, "keys", {"judge": "sk-very-secret"})
    login = json.dumps({"auths": {"registry.example": {"auth": "x"}}})
    secret(api, "login", {".dockerconfigjson": login})
    api.proxies["mlflow:5000"] = lambda path, _: (200 if path.startswith(SEARCH) else 404, "{}")
    ray_cluster(api)


def policies(api: Api, *sets: str) -> None:
    """Adds the network policies of a release of the chart."""
    for policy in kind(render(sets=(*CLUSTER, *sets)), "NetworkPolicy"):
        path = "/apis/networking.k8s.io/v1/namespaces/team/networkpolicies"
        api.put(f"{path}/{policy['metadata']['name']}", policy)


def secret(api: Api, name: str, values: dict[str, str]) -> None:
    data = {key: b64encode(value.encode()).decode() for key, value in values.items()}
    api.put(f"{TEAM}/secrets/{name}", {"metadata": {"name": name}, "data": data})


def ray_cluster(api: Api, guarded: bool = True) -> None:
    """Adds a Ray cluster whose jobs API requires its token if `guarded`."""
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


def doctor_output(capsys: pytest.CaptureFixture, *arguments: str, code: int) -> str:
    """Returns what doctor prints after asserting its exit code."""
    assert cli.main(["doctor", "small.yaml", *arguments]) == code
    return capsys.readouterr().out


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def test_doctor_finds_nothing_wrong_with_a_healthy_cluster(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    output = doctor_output(capsys, code=0)
    assert "✗" not in output and "–" not in output.replace(" – ", "")
    for line in (
        r"✓ +versions +http\S+ runs v1.37.1",
        r"✓ +operator +operator kuberay/kuberay-operator is \S+:v1.7.0",
        r"✓ +policies +team has no network policy of the chart",
        r"✓ +namespace +team, Pod Security restricted;",
        r"✓ +permissions +these credentials have every permission that .* need in team",
        r"✓ +nodes +group cpu: 1 × 4 cpu, 16Gi memory; the nodes, if empty, hold 7 of",
        r"✓ +nodes +group gpu: 2 × 8 cpu, 64Gi memory, 4 nvidia.com/gpu; the nodes, .* hold 2 of",
        r"✓ +quotas +quota team has room for the run",
        r"✓ +limits +no limit range excludes a pod",
        r"✓ +queue +LocalQueue research is active",
        r"✓ +storage +claim shared: Bound, ReadWriteMany, class nfs",
        r"✓ +secrets +JUDGE_KEY: secret keys has judge",
        r"✓ +image +pull secret login has a login for registry.example",
        r"✓ +MLflow +http://mlflow:5000 answers",
        r"✓ +Ray +demo: the dashboard answers, requires a token and accepts this one",
    ):
        assert re.search(line, output), (line, output)
    assert "sk-very-secret" not in output and "ray-token" not in output and TOKEN not in output


def changed(path: str, **changes: Any) -> Callable[[Api], None]:
    return lambda api: api.objects[path].update(changes)


def deleted(path: str) -> Callable[[Api], None]:
    return lambda api: api.objects.pop(path) and None


def small_nodes(api: Api) -> None:
    for name in ("a", "b"):
        api.objects[f"/api/v1/nodes/gpu-{name}"]["status"]["allocatable"]["nvidia.com/gpu"] = "3"


def quota(api: Api, **hard: str) -> None:
    hard = {key.replace("__", "/").replace("_", "."): value for key, value in hard.items()}
    spec = {"spec": {"hard": hard}, "status": {"hard": hard, "used": {}}}
    api.objects[f"{TEAM}/resourcequotas/team"] |= spec


def limit(api: Api, **limits: Any) -> None:
    api.objects[f"{TEAM}/limitranges/sizes"]["spec"] = {"limits": [limits]}


DEPLOYMENT = "/apis/apps/v1/namespaces/kuberay/deployments/kuberay-operator"
OLD = {"spec": {"template": {"spec": {"containers": [{"image": "kuberay/operator:v1.5.1"}]}}}}
CLAIM = f"{TEAM}/persistentvolumeclaims/shared"
FAULTY: dict[str, tuple[Callable[[Api], None], str]] = {
    "old server": (
        changed("/version", minor="28+", gitVersion="v1.28.0"),
        r"– +versions .*v1.28.0.* use 1.34 to 1.37, which zephyr is tested with",
    ),
    "no kinds": (
        deleted("/apis/ray.io/v1"),
        r"✗ +operator +no rayclusters and rayjobs in ray.io/v1 +helm install kuberay-operator",
    ),
    "no operator": (deleted(DEPLOYMENT), r"✗ +operator .*no operator is running .*helm install"),
    "operator down": (changed(DEPLOYMENT, status={}), r"✗ +operator .*no running pod +kubectl"),
    "old operator": (
        changed(DEPLOYMENT, **OLD),
        r"✗ +operator .*v1.5.1, older than .* upgrade its CRDs",
    ),
    "no namespace": (deleted(TEAM), r"✗ +namespace +no namespace team +kubectl create namespace"),
    "operator shut out": (
        lambda api: policies(api),
        r"✗ +policies +the chart's network policies admit the operator from kuberay-system, but it "
        r"runs in kuberay +helm upgrade .* --set networkPolicy.operatorNamespace=kuberay",
    ),
    "missing permission": (
        lambda api: api.denied.update({"create rayjobs", "get pods/log"}),
        r"✗ +permissions +these credentials cannot create rayjobs, get pods/log in team +ask for",
    ),
    "tainted": (
        changed("/api/v1/nodes/cpu", spec={"unschedulable": True}),
        r"✗ +nodes +group cpu: .* hold 0 of these",
    ),
    "too small together": (
        # The node holds the head and the submitter, or the CPU worker, but not all three.
        changed("/api/v1/nodes/cpu", status={"allocatable": {"cpu": "6", "memory": "64Gi"}}),
        r"✗ +nodes +1 of the run's 5 pods do not fit beside the others, even on empty nodes +add",
    ),
    "head too large": (
        changed("/api/v1/nodes/cpu", status={"allocatable": {"cpu": "1", "memory": "64Gi"}}),
        r"✗ +nodes +the head: 1 × 2 cpu, 8Gi memory; .* hold 0 of these",
    ),
    "few GPUs": (
        small_nodes,
        r"✗ +nodes +group gpu: .* hold 0 of these +6 nvidia.com/gpu allocatable in total",
    ),
    "taint": (
        lambda api: [
            api.objects[f"/api/v1/nodes/gpu-{name}"].update(
                spec={"taints": [{"key": "team", "value": "vision", "effect": "NoExecute"}]}
            )
            for name in ("a", "b")
        ],
        r"✗ +nodes +group gpu: .* hold 0 of these; large enough but excluded: nodes with the taint "
        r"team=vision:NoExecute \(2\) +change node_selector or tolerations in the profile",
    ),
    "missing label": (
        lambda api: api.objects["/api/v1/nodes/gpu-a"]["metadata"].update(labels={"pool": "t4"}),
        r"✗ +nodes +group gpu: .* hold 1 of these; .*: nodes without the label pool=a100 \(1\) ",
    ),
    "quota of CPUs": (
        lambda api: quota(api, requests_cpu="22400m"),
        r"✗ +quotas +quota team: the run needs 22.5 requests.cpu, 22.4 of 22400m are free +raise",
    ),
    "quota of memory": (
        lambda api: quota(api, memory="152Gi"),
        r"✗ +quotas +quota team: the run needs 153 GiB memory, 152 GiB of 152Gi are free +raise",
    ),
    "GPUs in use": (
        lambda api: api.objects[f"{TEAM}/resourcequotas/team"]["status"]["used"].update(
            {"requests.nvidia.com/gpu": "4"}
        ),
        r"✗ +quotas +quota team: the run needs 8 requests.nvidia.com/gpu, 6 of 10 are free",
    ),
    "quota of pods": (
        lambda api: quota(api, count__pods="4"),
        r"✗ +quotas +quota team: the run needs 5 count/pods, 4 of 4 are free",
    ),
    "quota of disk": (
        lambda api: api.objects[f"{TEAM}/resourcequotas/team"]["status"]["hard"].update(
            {"requests.ephemeral-storage": "1Ti"}
        ),
        r"✗ +quotas +quota team covers requests.ephemeral-storage, which .* set a default for",
    ),
    "quotas forbidden": (
        lambda api: api.forbidden.add("/resourcequotas$"),
        r"– +quotas +not allowed: resourcequotas is forbidden",
    ),
    "container too large": (
        lambda api: limit(api, type="Container", max={"memory": "63Gi"}),
        r"✗ +limits +limit range sizes: group gpu has memory 64Gi, the maximum is 63Gi +change",
    ),
    "pod too large": (
        lambda api: limit(api, type="Pod", max={"nvidia.com/gpu": "2"}),
        r"✗ +limits +limit range sizes: group gpu has nvidia.com/gpu 4, the maximum is 2 +change",
    ),
    "init container too small": (
        lambda api: limit(api, type="Container", min={"memory": "1Gi"}),
        r"✗ +limits +limit range sizes: the operator's init container has memory 256Mi, the min",
    ),
    "no Kueue": (
        deleted("/apis/kueue.x-k8s.io"),
        r"✗ +queue +the profile names a queue, but Kueue is not installed",
    ),
    "no queue": (
        deleted(QUEUE),
        r"✗ +queue +no LocalQueue research in team +use one from kubectl get localqueues -n team",
    ),
    "stopped queue": (
        lambda api: api.objects[QUEUE]["status"]["conditions"][0].update(
            status="False", message="ClusterQueue is stopped"
        ),
        r"✗ +queue +LocalQueue research is not active: ClusterQueue is stopped +kubectl describe",
    ),
    "nodes forbidden": (
        lambda api: api.forbidden.add("/nodes$"),
        r"– +nodes +not allowed: nodes is forbidden",
    ),
    "no claim": (
        deleted(CLAIM),
        r"✗ +storage +no claim shared in team +create a ReadWriteMany claim",
    ),
    "claim for one node": (
        changed(CLAIM, spec={"accessModes": ["ReadWriteOnce"], "storageClassName": "nfs"}),
        r"✗ +storage .*ReadWriteOnce.* use a storage class with ReadWriteMany",
    ),
    "unbound": (
        changed(CLAIM, status={"phase": "Pending"}),
        r"✗ +storage +claim shared: Pending.* kubectl describe pvc shared",
    ),
    "no secret": (
        deleted(f"{TEAM}/secrets/keys"),
        r"✗ +secrets +JUDGE_KEY: no secret keys in team +kubectl create secret generic keys",
    ),
    "wrong key": (
        lambda api: secret(api, "keys", {"other": "x"}),
        r"✗ +secrets +JUDGE_KEY: secret keys has no judge; it has other",
    ),
    "secrets forbidden": (
        lambda api: api.forbidden.add("/secrets/keys"),
        r"– +secrets +not allowed: keys is forbidden",
    ),
    "no login": (deleted(f"{TEAM}/secrets/login"), r"✗ +image +no pull secret login in team"),
    "other login": (
        lambda api: secret(api, "login", {".dockerconfigjson": '{"auths": {"quay.io": {}}}'}),
        r"✗ +image +pull secret login is for quay.io, not registry.example",
    ),
    "MLflow forbidden": (
        lambda api: api.forbidden.add("/services/mlflow:5000"),
        r"– +MLflow +not allowed: ",
    ),
    "MLflow needs an account": (
        lambda api: api.proxies.update({"mlflow:5000": lambda path, _: (401, "who are you")}),
        r"✗ +MLflow +http://mlflow:5000 needs an account.*MLFLOW_TRACKING_USERNAME",
    ),
    "not MLflow": (
        lambda api: api.proxies.update({"mlflow:5000": lambda path, _: (404, "not found")}),
        r"✗ +MLflow +http://mlflow:5000: not found",
    ),
    "MLflow behind a network policy": (
        lambda api: api.faults.append(
            Fault("GET", "mlflow:5000", 503, message="error trying to reach service: i/o timeout")
        ),
        r"– +MLflow +.*trying to reach service.* a network policy may block the API server",
    ),
    "items not a list": (
        lambda api: api.faults.append(Fault("GET", "nodes", 200, message='{"items": {}}')),
        r"✗ +nodes +\S+ does not answer as a Kubernetes API server",
    ),
    "unexpected objects": (
        lambda api: api.put("/api/v1/nodes/odd", {"metadata": {"name": "odd"}, "status": []}),
        r"– +nodes +unexpected answer from the cluster",
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
        r"✗ +Ray +demo: the dashboard rejects the token",
    ),
    "token of two lines": (
        lambda api: secret(api, "demo", {"auth_token": "ray-token\nof-another"}),
        r"✗ +Ray +the Ray cluster's token or password contains a line break",
    ),
    "no Ray": (
        deleted("/apis/ray.io/v1/namespaces/team/rayclusters/demo"),
        r"– +Ray +no Ray cluster is running",
    ),
}


@pytest.mark.parametrize(("break_it", "line"), FAULTY.values(), ids=FAULTY)
def test_doctor_reports_the_fault_and_the_fix(
    api: Api,
    here: Path,
    wide: None,
    capsys: pytest.CaptureFixture,
    break_it: Callable[[Api], None],
    line: str,
) -> None:
    healthy(api)
    break_it(api)
    output = doctor_output(capsys, code=1 if line.startswith("✗") else 0)
    assert re.search(line, output), output
    assert "ray-token" not in output
    failures = [row for row in output.splitlines() if row.startswith(("✗", "–"))]
    # Without KubeRay there are no Ray clusters either; the head and the submitter also need the
    # CPU node.
    more = {"no rayclusters": 2, "the head": 2, "group cpu": 3}
    expected = next((count for text, count in more.items() if text in line), 1)
    assert len(failures) == expected, output


def test_a_check_that_times_out_is_a_failure(
    api: Api,
    here: Path,
    wide: None,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = profile_checks.check_storage

    def check_storage(*arguments: Any) -> Iterator[CheckResult]:
        with monkeypatch.context() as patch:  # only for the request that hangs
            patch.setattr(kube, "READ_SECONDS", 0.3)
            yield from check(*arguments)

    monkeypatch.setattr(profile_checks, "check_storage", check_storage)
    healthy(api)
    api.faults = [Fault("GET", "persistentvolumeclaims", "hang")]
    output = doctor_output(capsys, code=1)
    line = r"✗ +storage +cannot reach \S+ \(timed out\) +check the address and the VPN, then try"
    assert re.search(line, output), output
    assert len(re.findall("^[✗–]", output, re.MULTILINE)) == 1, output


def test_doctor_finds_the_operator_where_the_policies_admit_it(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    policies(api, "networkPolicy.operatorNamespace=kuberay")
    output = doctor_output(capsys, code=0)
    assert re.search(r"✓ +policies +the chart's network policies admit the operator", output)


def test_doctor_installs_the_operator_with_the_command_of_the_chart() -> None:
    """The command installs it in a namespace that the policies admit, without `helm repo add`."""
    rule = (CHART / "templates" / "_rules.tpl").read_text()
    assert kube.OPERATOR_COMMAND in rule


def test_doctor_needs_no_recipe_and_no_secrets(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    write_profile(here, secrets=None, mlflow=None)
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"✓ +secrets +none needed", output)
    write_profile(here, secrets=None)
    output = doctor_output(capsys, code=1)
    assert re.search(
        r"✗ +secrets +the recipe reads JUDGE_KEY, but the profile has no secret", output
    )


def test_doctor_without_a_valid_token_says_so(
    api: Api, here: Path, wide: None, capsys: pytest.CaptureFixture
) -> None:
    healthy(api)
    (here / "kubeconfig").write_text(api.kubeconfig({"token": "old"}))
    output = doctor_output(capsys, code=1)
    assert "✓" not in output
    assert "does not accept these credentials; log in again" in output and "old" not in output


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        ({"phase": "Succeeded"}, 0, r"✓ +pull +registry.example/zephyr-ray:1.0 was pulled in"),
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
def test_doctor_pulls_the_image_with_a_pod_that_it_deletes(
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
    store = api.put

    def put(path: str, document: dict[str, Any], kind: str = "") -> dict[str, Any]:
        is_pod = "/pods/zephyr-pull" in path and kind != "DELETED"
        return store(path, document | {"status": status} if is_pod else document, kind)

    api.put = put  # type: ignore[method-assign]  # plays the kubelet
    assert re.search(line, doctor_output(capsys, "--pull", code=code))
    containers = [request.body["spec"]["containers"][0] for request in api.sent("POST", "pods$")]
    assert [c["image"].rpartition(":")[2] for c in containers] == ["1.0", "1.0-gpu"]
    assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in containers)
    assert not [path for path in api.objects if "/pods/zephyr-pull" in path]
