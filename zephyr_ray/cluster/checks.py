"""Checks the cluster itself; each check yields its results."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from zephyr_ray.cluster.kube import OPERATOR_COMMAND, Kube, Missing, NoRayJobs

OPERATOR_MINIMUM = (1, 7)
OPERATOR_LABEL = "app.kubernetes.io/name=kuberay-operator"
TESTED_MINORS = 4
"""Number of newest Kubernetes minor versions that the chart is tested against."""
REQUIRED_VERBS = [
    ("ray.io", "rayjobs", ("create", "get", "list", "watch", "delete")),
    ("", "configmaps", ("create",)),
    ("", "pods", ("list",)),
    ("", "pods/log", ("get",)),
    ("", "events", ("list",)),
]
"""Permissions that submit, status, logs and stop use, as (group, resource, verbs)."""


@dataclass(frozen=True)
class CheckResult:
    """One row of doctor's table."""

    state: Literal["good", "bad", "unknown"]
    """`unknown` if these credentials or this machine cannot determine the result."""
    observation: str
    fix: str = ""
    """A command or an imperative; empty if nothing needs fixing."""


good = partial(CheckResult, "good")
bad = partial(CheckResult, "bad")
unknown = partial(CheckResult, "unknown")


def check_versions(kube: Kube) -> Iterator[CheckResult]:
    """Checks that the server runs a tested minor version, or one minor version newer."""
    import kubernetes

    client = kubernetes.__version__
    newest = int(client.split(".")[0])
    server = kube.get("/version")
    minor = int(re.sub(r"\D", "", str(server.get("minor", ""))) or 0)
    observation = f"{kube.host} runs {server.get('gitVersion')}, the client is {client}"
    if newest - TESTED_MINORS < minor <= newest + 1:
        yield good(observation)
    else:
        tested = f"1.{newest - TESTED_MINORS + 1} to 1.{newest}"
        yield unknown(
            observation, f"use {tested}, which zephyr is tested with; other versions may work"
        )


def check_operator(kube: Kube) -> Iterator[CheckResult]:
    """Checks that KubeRay's resources exist and a recent operator is running."""
    try:
        kinds = {r["name"] for r in kube.get("/apis/ray.io/v1")["resources"]}
    except NoRayJobs:
        kinds = set()
    missing = [kind for kind in ("rayclusters", "rayjobs") if kind not in kinds]
    if missing:
        yield bad(f"no {' and '.join(missing)} in ray.io/v1", OPERATOR_COMMAND)
        return
    yield good("ray.io/v1 has rayclusters and rayjobs")
    deployments = kube.items("/apis/apps/v1/deployments", labelSelector=OPERATOR_LABEL)
    if not deployments:
        yield bad("the resources exist, but no operator is running", OPERATOR_COMMAND)
    for deployment in deployments:
        metadata = deployment["metadata"]
        name = f"{metadata['namespace']}/{metadata['name']}"
        image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        version = re.search(r":v?(\d+)\.(\d+)", image)
        if not deployment.get("status", {}).get("availableReplicas"):
            describe = f"kubectl describe deployment -n {metadata['namespace']} {metadata['name']}"
            yield bad(f"operator {name} has no running pod", describe)
        elif version and (int(version[1]), int(version[2])) < OPERATOR_MINIMUM:
            oldest = ".".join(map(str, OPERATOR_MINIMUM))
            yield bad(
                f"operator {name} is {image}, older than {oldest}",
                "upgrade its CRDs, then the operator (docs/kubernetes-platform.md)",
            )
        else:
            yield good(f"operator {name} is {image}")


def check_policies(kube: Kube) -> Iterator[CheckResult]:
    """Checks that the chart's network policies admit the operator to the jobs of the namespace."""
    policies = kube.items(
        f"/apis/networking.k8s.io/v1/namespaces/{kube.namespace}/networkpolicies",
        labelSelector="app.kubernetes.io/name=zephyr",
    )
    admitted = {
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for policy in policies
        if policy["spec"]["podSelector"]["matchLabels"].get("zephyr-ray/part") == "pipeline"
        for rule in policy["spec"]["ingress"]
        if {"port": 8265, "protocol": "TCP"} in rule.get("ports", [])
        for peer in rule["from"]
        if "namespaceSelector" in peer
    }
    if not admitted:
        yield good(f"{kube.namespace} has no network policy of the chart")
        return
    deployments = kube.items("/apis/apps/v1/deployments", labelSelector=OPERATOR_LABEL)
    for namespace in {d["metadata"]["namespace"] for d in deployments} - admitted:
        yield bad(
            f"the chart's network policies admit the operator from {' and '.join(admitted)}, but "
            f"it runs in {namespace}",
            "helm upgrade RELEASE helm/zephyr --reset-then-reuse-values "
            f"--set networkPolicy.operatorNamespace={namespace}",
        )
        return
    yield good("the chart's network policies admit the operator")


def check_namespace(kube: Kube) -> Iterator[CheckResult]:
    """Checks that the namespace exists and reports its Pod Security level."""
    name = kube.namespace
    try:
        labels = kube.get(f"/api/v1/namespaces/{name}")["metadata"].get("labels") or {}
    except Missing:
        yield bad(f"no namespace {name}", f"kubectl create namespace {name}")
        return
    enforced = labels.get("pod-security.kubernetes.io/enforce", "not set on the namespace")
    yield good(f"{name}, Pod Security {enforced}; the run's pods comply with restricted")


def check_permissions(kube: Kube) -> Iterator[CheckResult]:
    """Checks every permission in REQUIRED_VERBS."""
    denied = []
    for group, resource, verbs in REQUIRED_VERBS:
        name, _, sub = resource.partition("/")
        target = {"namespace": kube.namespace, "group": group, "resource": name, "subresource": sub}
        for verb in verbs:
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {**target, "verb": verb}},
            }
            path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            if not kube.create(path, review)["status"].get("allowed"):
                denied.append(f"{verb} {resource}")
    if denied:
        yield bad(
            f"these credentials cannot {', '.join(denied)} in {kube.namespace}",
            "ask for a Role with these verbs (docs/kubernetes-client.md)",
        )
    else:
        yield good(
            "these credentials have every permission that submit, status, logs and stop need in "
            f"{kube.namespace}"
        )
