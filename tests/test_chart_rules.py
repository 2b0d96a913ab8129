"""Tests values that the chart rejects: by its rules, with one error line each, or by its schema."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from chart_tools import CHART, CLUSTER, SERVE, template, values_errors

PEER = "networkPolicy.serveClients[0].podSelector.matchLabels.app=web"
INGRESS = (*SERVE, PEER, "ingress.enabled=true", "ingress.host=chat.example")
JOB = (*CLUSTER, "pipeline.enabled=true")
GROUP = "workerGroups.cpu"
RULES = {
    "head-memory": ((*CLUSTER, "ray.head.resources.memory=3Gi"), "a head needs at least 4Gi"),
    "ray-version": ((*CLUSTER, "ray.version=2.51.1"), "ray.auth token needs Ray 2.52"),
    "ray-hangs": (
        (*CLUSTER, "ray.version=2.37.0", "ray.auth=disabled"),
        "the agents of Ray 2.11 to 2.37 hang",
    ),
    "open-ray": (
        (*CLUSTER, "ray.auth=disabled", "networkPolicy.enabled=false"),
        "would let anyone in the cluster run code",
    ),
    "redis-address": (
        (*CLUSTER, "ray.gcsFaultTolerance.enabled=true"),
        "set ray.gcsFaultTolerance.redisAddress",
    ),
    "redis-port": (
        (*CLUSTER, "ray.gcsFaultTolerance.redisAddress=rediss://redis.storage"),
        "redisAddress rediss://redis.storage has no port; write it like rediss://redis.storage:6379",
    ),
    "redis-claim": (
        (
            *CLUSTER, "ray.gcsFaultTolerance.enabled=true", "storage.keep=false",
            "ray.gcsFaultTolerance.redisAddress=redis:6379",
        ),
        "storage.keep false would delete the claim that the operator's clean-up of Redis mounts",
    ),
    "redis-user": (
        (*CLUSTER, "ray.gcsFaultTolerance.usernameKey=user"),
        "usernameKey names a key of a Secret; set ray.gcsFaultTolerance.existingSecret",
    ),
    "head-num-cpus": (
        (*CLUSTER, "ray.head.rayStartParams.num-cpus=null2"),
        "ray.head.rayStartParams.num-cpus: Ray takes it from the resources",
    ),
    "group-num-gpus": (
        (*CLUSTER, GROUP + ".rayStartParams.num-gpus=one"),
        "workerGroups.cpu.rayStartParams.num-gpus: Ray takes it from the resources",
    ),
    "group-labels": (
        (*CLUSTER, GROUP + ".rayStartParams.labels=a"),
        "use the labels of the worker group",
    ),
    "redis-parameter": (
        (*CLUSTER, "ray.head.rayStartParams.redis-password=x"),
        "redis-password: use ray.gcsFaultTolerance",
    ),
    "operators-parameter": (
        (*CLUSTER, GROUP + ".rayStartParams.address=x"),
        "address is set by the chart or the operator",
    ),
    "no-replicas": ((*CLUSTER, GROUP + ".minReplicas=null"), "set workerGroups.cpu.minReplicas"),
    "no-maximum": ((*CLUSTER, GROUP + ".maxReplicas=null"), "set workerGroups.cpu.maxReplicas"),
    "no-resources": ((*CLUSTER, GROUP + ".resources=null"), "set workerGroups.cpu.resources"),
    "no-cpus": ((*CLUSTER, GROUP + ".resources.cpu=null"), "set workerGroups.cpu.resources.cpu"),
    "no-memory": (
        (*CLUSTER, GROUP + ".resources.memory=null"),
        "set workerGroups.cpu.resources.memory",
    ),
    "removed-group": ((*CLUSTER, "workerGroups.cpu=null"), "workerGroups has no group"),
    "replicas-order": ((*CLUSTER, GROUP + ".minReplicas=5"), "minReplicas 5 is more than"),
    "replicas-range": ((*CLUSTER, GROUP + ".replicas=9"), "replicas 9 is not between"),
    "two-affinities": (
        (
            *CLUSTER, GROUP + ".sameTopology=zone",
            f"{GROUP}.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution"
            "[0].topologyKey=host",
        ),
        "sameTopology and affinity.podAffinity exclude each other",
    ),
    "unknown-group": (
        (*CLUSTER, "cluster.workerGroups={gpus}"),
        "has no group 'gpus'; add it, or use one of [cpu, gpu]",
    ),
    "redis-environment": (
        (*CLUSTER, "ray.env.RAY_REDIS_ADDRESS=x"),
        "RAY_REDIS_ADDRESS is set by the chart or the operator",
    ),
    "autoscaler-environment": (
        (*CLUSTER, "ray.env.RAY_enable_autoscaler_v2=on1"),
        "RAY_enable_autoscaler_v2 is set by",
    ),
    "serve-environment": (
        (*CLUSTER, "ray.env.RAY_worker_niceness=n15"),
        "RAY_worker_niceness is set by the chart or the operator; remove it",
    ),
    "name-twice": (
        (
            *CLUSTER, "ray.env.A=b", "ray.secretEnv[0].name=A", "ray.secretEnv[0].secret=s",
            "ray.secretEnv[0].key=k",
        ),
        "a name appears twice",
    ),
    "secret-of-the-token": (
        ("mlflow.auth.existingSecret=zephyr",),
        "the Secret name 'zephyr' is taken by the operator for the Ray cluster's token",
    ),
    "access-mode": ((*CLUSTER, "storage.accessMode=ReadWriteOnce"), "serves only one node"),
    "kueue-queue": (
        (*JOB, "scheduling.scheduler=volcano"),
        "volcano needs a queue; set scheduling.queue",
    ),
    "kueue-autoscaling": (
        (*CLUSTER, "scheduling.scheduler=kueue", "scheduling.queue=q"),
        "set cluster.autoscaling to false",
    ),
    "kueue-group": (
        (
            *JOB, "scheduling.scheduler=kueue", "scheduling.queue=q", "cluster.enabled=false",
            "workerGroups.head.minReplicas=1", "workerGroups.head.maxReplicas=1",
            "workerGroups.head.resources.cpu=1", "workerGroups.head.resources.memory=1Gi",
            "pipeline.workerGroups={head}",
        ),
        "pipeline.workerGroups: Kueue itself names a job's own pods 'head' and 'submitter'",
    ),
    "selecting-label": (
        (*CLUSTER, GROUP + ".labels.app\\.kubernetes\\.io/name=x"),
        "workerGroups.cpu.labels: the operator or the chart uses app.kubernetes.io/name itself",
    ),
    "unknown-recipe": ((*JOB, "pipeline.recipe=mine.yaml"), "recipes has no 'mine.yaml'"),
    "serve-run": (
        (*CLUSTER, "serve.enabled=true"),
        "serve.enabled needs a run to serve; set serve.run",
    ),
    "serve-keys": (
        (*CLUSTER, "serve.enabled=true", "serve.run=r"),
        "set serve.apiKeys.existingSecret to a Secret: kubectl create secret",
    ),
    "serve-replicas": ((*SERVE, "serve.replicas=3"), "maxReplicas 1 is less than serve.replicas 3"),
    "serve-gpus": ((*SERVE, "serve.gpus=1"), "serve.gpus is 1, but no group in serve.workerGroups"),
    "serve-gpus-of-one": (
        (*SERVE, "serve.gpus=9", "serve.workerGroups={cpu,gpu}"),
        "serve.gpus is 9, but no group in serve.workerGroups has that many",
    ),
    "serve-tokens": ((*SERVE, "serve.maxTokens=5000"), "5000 is more than serve.context 2048"),
    "no-pods": (
        (*JOB, "pipeline.workerGroups={cpu,gpu}"),
        "pipeline.workerGroups: group 'gpu' has no pods and no autoscaler to add any",
    ),
    "cpu-request": (
        (*CLUSTER, "mlflow.resources.cpu=500m", "mlflow.resources.cpuRequest=0.6"),
        "mlflow.resources: cpuRequest 0.6 is more than the limit cpu 500m",
    ),
    "dashboard-port": (
        (*CLUSTER, "ray.head.rayStartParams.dashboard-port=x1"),
        "dashboard-port is set by the chart or the operator",
    ),
    "recipe-name": ((*CLUSTER, "recipes.a--b=x"), "recipes: 'a--b' contains --"),
    "submitter-namespace": (
        (*CLUSTER, "rbac.submitters[0].kind=ServiceAccount", "rbac.submitters[0].name=ci"),
        "the ServiceAccount 'ci' has no namespace; add it",
    ),
    "mlflow-account": ((), "set mlflow.auth.existingSecret to a Secret: kubectl create"),
    "two-mlflows": ((*CLUSTER, "mlflow.trackingUri=http://m:5000"), "names another server"),
    "ingress-serve": ((*CLUSTER, "ingress.enabled=true"), "set serve.enabled"),
    "ingress-peers": ((*SERVE, "ingress.enabled=true"), "namespace to networkPolicy.serveClients"),
    "ingress-host": (
        (*SERVE, PEER, "ingress.enabled=true"),
        "ingress.enabled needs a host; set ingress.host",
    ),
    "ingress-tls": ((*INGRESS, "ingress.tls.enabled=true"), "set ingress.tls.secretName"),
    "gateway-parent": ((*SERVE, PEER, "gateway.enabled=true"), "set gateway.parentRefs"),
    "prometheus": ((*CLUSTER, "podMonitor.enabled=true"), "set networkPolicy.prometheusNamespace"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_one_clear_line(rule: str) -> None:
    sets, expected = RULES[rule]
    line = _rejection(template(sets=sets))
    assert expected in line


@pytest.mark.parametrize(
    ("api", "sets", "expected"),
    [
        ("ray.io/v1/RayCluster", CLUSTER, "helm install kuberay-operator"),
        ("monitoring", (*CLUSTER, "podMonitor.enabled=true"), "the Prometheus operator is not on"),
        (
            "gateway",
            (*SERVE, PEER, "gateway.enabled=true", "gateway.parentRefs[0].name=g"),
            "the Gateway API is not on this cluster",
        ),
    ],
)
def test_a_missing_api_is_named(api: str, sets: tuple[str, ...], expected: str) -> None:
    apis = () if api.startswith("ray.io") else ("ray.io/v1/RayCluster",)
    assert expected in _rejection(template(sets=sets, apis=apis))


def test_a_name_starts_with_a_letter() -> None:
    assert "must start with a letter" in _rejection(template(sets=CLUSTER, release="1st"))


def test_kueue_accepts_at_most_seven_groups(tmp_path: Path) -> None:
    group = {"minReplicas": 1, "maxReplicas": 1, "resources": {"cpu": "1", "memory": "2Gi"}}
    names = [f"g{number}" for number in range(8)]
    values = {
        "workerGroups": dict.fromkeys(names, group),
        "cluster": {"autoscaling": False, "workerGroups": names},
        "scheduling": {"scheduler": "kueue", "queue": "q"},
        "mlflow": {"auth": {"existingSecret": "s"}},
    }
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    assert "cluster.workerGroups has 8 groups; Kueue accepts at most 7" in _rejection(
        template(str(path))
    )


def test_recipes_fit_a_configmap(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(
        yaml.safe_dump(
            {"recipes": {"a.yaml": "x" * 1_000_001}, "mlflow": {"auth": {"existingSecret": "s"}}}
        )
    )
    assert "a ConfigMap holds 1 MB" in _rejection(template(str(path)))


def test_helm_reads_the_schema() -> None:
    done = template(sets=(*CLUSTER, "cluster.autoscalling=true"))
    assert done.returncode != 0
    assert "additional properties 'autoscalling' not allowed" in done.stderr


@pytest.mark.parametrize(
    "values",
    [
        {"workerGroups": {"cpu": {"resources": {"memory": 1024}}}},
        {"pipeline": {"set": ["a.b=c\u2028d"]}},
        {"workerGroups": {"cpu": {"rayStartParams": {"object-store-memory": 1000}}}},
        {"workerGroups": {"cpu": {"minReplicas": -1}}},
        {"workerGroups": {"cpu": {"resources": {"memoryRequest": "1Gi"}}}},
        {"workerGroups": {"CPU": {}}},
        {"workerGroups": {"gpu": {"gpuResource": "nvidia.com/mig-3g"}}},
        {"ray": {"head": {"restartPolicy": "Always"}}},
        {"ray": {"auth": "none"}},
        {"ray": {"head": {"serviceName": "mine"}}},
        {"pipeline": {"backoffLimit": -1}},
        {"pipeline": {"backoffLimit": 101}},
        {"pipeline": {"activeDeadlineSeconds": 0}},
        {"pipeline": {"ttlSecondsAfterFinished": -1}},
        {"pipeline": {"shutdownAfterJobFinishes": False}},
        {"pipeline": {"submissionMode": "SidecarMode"}},
        {"pipeline": {"clusterSelector": {}}},
        {"pipeline": {"set": ["no value"]}},
        {"pipeline": {"workerGroups": []}},
        {"pipeline": {"recipe": "a b.yaml"}},
        {"serve": {"run": "../other"}},
        {"serve": {"upgradeStrategy": "NewClusterWithIncrementalUpgrade"}},
        {"mlflow": {"auth": {"password": "plain"}}},
        {"mlflow": {"artifacts": {"destination": "/tmp"}}},
        {"storage": {"accessMode": "ReadOnlyMany"}},
        {"networkPolicy": {"internetPorts": [0]}},
        {"networkPolicy": {"apiServer": {"ports": []}}},
        {"networkPolicy": {"dns": {"ports": []}}},
        {"networkPolicy": {"extraEgress": [{}]}},
        {"networkPolicy": {"extraEgress": [{"to": []}]}},
        {"networkPolicy": {"extraEgress": [{"to": [{"ipBlock": "10.0.0.0/8"}]}]}},
        {"networkPolicy": {"extraEgress": [{"ports": [{"prot": 443}]}]}},
        {"networkPolicy": {"serveClients": [{}]}},
        {"networkPolicy": {"serveClients": [{"podSelector": {"matchLabel": {}}}]}},
        {"scheduling": {"scheduler": "slurm"}},
        {"anything": {}},
    ],
    ids=lambda values: json.dumps(values)[:60],
)
def test_the_schema_rejects(values: dict[str, object]) -> None:
    assert values_errors(values)


def test_the_schema_is_closed_everywhere() -> None:
    def walk(schema: object, path: str) -> None:
        if isinstance(schema, list):
            for number, item in enumerate(schema):
                walk(item, f"{path}/{number}")
        elif isinstance(schema, dict):
            if isinstance(schema.get("properties"), dict):
                assert schema.get("additionalProperties") is False, path
            for key, value in schema.items():
                walk(value, f"{path}/{key}")

    walk(json.loads((CHART / "values.schema.json").read_text()), "")
    assert values_errors({}) == []


def _rejection(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, "helm rendered it"
    (line,) = [line for line in done.stderr.splitlines() if "Error:" in line or "error:" in line]
    return line
