"""What a run needs of a cluster, one check a function: each tells what it saw, and the fix."""

import json
import re
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from zephyr_ray.cluster.job import job_name, restricted_pod
from zephyr_ray.cluster.kube import Forbidden, Kube, Missing
from zephyr_ray.cluster.profile import Profile, Workers, quantity
from zephyr_ray.recipe import Recipe

OPERATOR = "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0"
OPERATOR_LEAST = (1, 7)
TESTED_MINORS = 4
"""The chart is checked against so many newest minors of Kubernetes."""
PULL_SECONDS = 600
POLL_SECONDS = 1.0
NEEDED = [
    ("ray.io", "rayjobs", ("create", "get", "list", "watch", "delete")),
    ("", "configmaps", ("create", "patch", "delete")),
    ("", "pods", ("get", "list")),
    ("", "pods/log", ("get",)),
    ("", "events", ("list",)),
]
"""What submit, status, logs and stop ask for, as (group, resource, verbs)."""


@dataclass(frozen=True)
class Verdict:
    """One line of the table. `unknown` is what could not be told from here."""

    state: Literal["good", "bad", "unknown"]
    saw: str
    fix: str = ""


def good(saw: str) -> Verdict:
    return Verdict("good", saw)


def bad(saw: str, fix: str) -> Verdict:
    return Verdict("bad", saw, fix)


def unknown(saw: str, fix: str = "") -> Verdict:
    return Verdict("unknown", saw, fix)


def versions(kube: Kube) -> Iterator[Verdict]:
    import kubernetes

    client = kubernetes.__version__
    newest = int(client.split(".")[0])
    found = kube.get("/version")
    minor = int(re.sub(r"\D", "", str(found.get("minor", ""))) or 0)
    saw = f"{kube.host} runs {found.get('gitVersion')}, the client is {client}"
    if newest - TESTED_MINORS < minor <= newest + 1:
        yield good(saw)
    else:
        tested = f"1.{newest - TESTED_MINORS + 1} to 1.{newest}"
        yield unknown(saw, f"zephyr is tested with {tested}; others may work")


def operator(kube: Kube) -> Iterator[Verdict]:
    try:
        kinds = {r["name"] for r in kube.get("/apis/ray.io/v1")["resources"]}
    except Missing:
        kinds = set()
    missing = [kind for kind in ("rayclusters", "rayjobs") if kind not in kinds]
    if missing:
        yield bad(f"no {' and '.join(missing)} in ray.io/v1", OPERATOR)
        return
    yield good("ray.io/v1 has rayclusters and rayjobs")
    label = "app.kubernetes.io/name=kuberay-operator"
    found = kube.items("/apis/apps/v1/deployments", labelSelector=label)
    if not found:
        yield bad("the kinds are there, but no operator that acts on them", OPERATOR)
    for deployment in found:
        metadata = deployment["metadata"]
        where = f"{metadata['namespace']}/{metadata['name']}"
        image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        version = re.search(r":v?(\d+)\.(\d+)", image)
        if not deployment.get("status", {}).get("availableReplicas"):
            describe = f"kubectl describe deployment -n {metadata['namespace']} {metadata['name']}"
            yield bad(f"operator {where} has no running pod", describe)
        elif version and (int(version[1]), int(version[2])) < OPERATOR_LEAST:
            yield bad(f"operator {where} is {image}", OPERATOR.replace("install", "upgrade"))
        else:
            yield good(f"operator {where} is {image}")


def namespace(kube: Kube) -> Iterator[Verdict]:
    name = kube.namespace
    try:
        labels = kube.get(f"/api/v1/namespaces/{name}")["metadata"].get("labels") or {}
    except Missing:
        yield bad(f"no namespace {name}", f"kubectl create namespace {name}")
        return
    enforced = labels.get("pod-security.kubernetes.io/enforce", "left to the cluster")
    yield good(f"{name}, Pod Security {enforced}; the pods of a run pass restricted")


def permissions(kube: Kube) -> Iterator[Verdict]:
    denied = []
    for group, resource, verbs in NEEDED:
        resource, _, sub = resource.partition("/")
        for verb in verbs:
            asked = {
                "namespace": kube.namespace,
                "verb": verb,
                "group": group,
                "resource": resource,
                "subresource": sub,
            }
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": asked},
            }
            path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            if not kube.create(path, review)["status"].get("allowed"):
                denied.append(f"{verb} {resource}{'/' if sub else ''}{sub}")
    if denied:
        yield bad(
            f"in {kube.namespace} you may not {', '.join(denied)}",
            "ask for a Role with these verbs (docs/kubernetes-client.md)",
        )
    else:
        yield good(f"all that submit, status, logs and stop need in {kube.namespace}")


def gpus(kube: Kube, profile: Profile) -> Iterator[Verdict]:
    nodes = kube.items("/api/v1/nodes")
    for name, group in profile.workers.items():
        asked = f"{group.gpu.count} {group.gpu.kind}" if group.gpu else "no GPU"
        fits = sum(_room(node, group) for node in nodes if _admits(node, group))
        saw = f"group {name}: {group.replicas} × {asked}; empty, the nodes hold {fits} of these"
        if fits >= group.replicas:
            yield good(saw)
            continue
        kind = group.gpu.kind if group.gpu else "cpu"
        all_of_it = sum(quantity(_allocatable(node).get(kind, "0")) for node in nodes)
        yield bad(
            saw,
            f"{all_of_it:g} {kind} allocatable in all: add nodes (is the GPU operator there?), or "
            "change node_selector, tolerations or amounts in the profile",
        )


def _allocatable(node: dict[str, Any]) -> dict[str, str]:
    return dict(node.get("status", {}).get("allocatable") or {})


def _room(node: dict[str, Any], group: Workers) -> int:
    """How many replicas an empty node of this kind would hold."""
    asked = {"cpu": group.cpu, "memory": group.memory}
    if group.gpu:
        asked[group.gpu.kind] = str(group.gpu.count)
    has = _allocatable(node)
    return int(min(quantity(has.get(kind, "0")) // quantity(n) for kind, n in asked.items()))


def _admits(node: dict[str, Any], group: Workers) -> bool:
    labels, spec = node["metadata"].get("labels") or {}, node.get("spec") or {}
    if spec.get("unschedulable") or not group.node_selector.items() <= labels.items():
        return False
    return all(
        taint["effect"] == "PreferNoSchedule"
        or any(_tolerates(t, taint) for t in group.tolerations)
        for taint in spec.get("taints") or []
    )


def _tolerates(toleration: Any, taint: dict[str, str]) -> bool:
    if toleration.effect not in (None, taint["effect"]):
        return False
    if toleration.key is None:
        return bool(toleration.operator == "Exists")
    same = toleration.operator == "Exists" or (toleration.value or "") == taint.get("value", "")
    return toleration.key == taint["key"] and same


def storage(kube: Kube, profile: Profile) -> Iterator[Verdict]:
    name = profile.storage.claim
    try:
        claim = kube.get(kube.path("persistentvolumeclaims", name))
    except Missing:
        yield bad(f"no claim {name} in {kube.namespace}", "make a ReadWriteMany claim of that name")
        return
    modes = claim["spec"].get("accessModes") or []
    phase = claim.get("status", {}).get("phase")
    kind = claim["spec"].get("storageClassName")
    saw = f"claim {name}: {phase}, {', '.join(modes)}, class {kind or 'none'}"
    waits = False
    if kind:
        try:
            found = kube.get(f"/apis/storage.k8s.io/v1/storageclasses/{kind}")
            waits = found.get("volumeBindingMode") == "WaitForFirstConsumer"
        except Missing:
            if phase != "Bound":
                yield bad(saw, f"no storage class {kind}: kubectl get storageclass lists them")
                return
        except Forbidden:
            pass  # the claim itself says whether it is bound
    if phase == "Lost" or (phase != "Bound" and not waits):
        yield bad(saw, f"kubectl describe pvc {name} says why it is not bound")
    elif "ReadWriteMany" not in modes:
        fix = "head and workers share it: use a storage class with ReadWriteMany (NFS, CephFS, …)"
        yield bad(saw, f"{fix}, unless the cluster is one node")
    else:
        yield good(saw)


def secrets(kube: Kube, profile: Profile, recipe: Recipe | None) -> Iterator[Verdict]:
    variables = recipe.variables() if recipe else {}
    for variable in [v for v in variables if v not in profile.secrets]:
        fix = f"in the profile, secrets: {variable}: {{name: SECRET, key: KEY}}"
        yield bad(f"the recipe reads {variable}, the profile has no secret for it", fix)
    for variable, secret in profile.secrets.items():
        make = f"kubectl create secret generic {secret.name} --from-file={secret.key}=FILE"
        make += f" -n {kube.namespace}"
        try:
            data = kube.get(kube.path("secrets", secret.name)).get("data") or {}
        except Missing:
            yield bad(f"{variable}: no secret {secret.name} in {kube.namespace}", make)
            continue
        if not data.get(secret.key):
            keys = ", ".join(sorted(data)) or "none"
            yield bad(f"{variable}: secret {secret.name} has no {secret.key}; it has {keys}", make)
        else:
            yield good(f"{variable}: secret {secret.name} has {secret.key}")
    if not profile.secrets and not variables:
        yield good("none needed")


def image(kube: Kube, profile: Profile) -> Iterator[Verdict]:
    first = profile.image.split("/")[0]
    named = "/" in profile.image and ("." in first or ":" in first or first == "localhost")
    registry = first if named else "docker.io"
    for name in profile.image_pull_secrets:
        make = f"kubectl create secret docker-registry {name} --docker-server={registry} …"
        try:
            data = kube.get(kube.path("secrets", name)).get("data") or {}
        except Missing:
            yield bad(f"no pull secret {name} in {kube.namespace}", make)
            continue
        try:
            hosts = json.loads(b64decode(data[".dockerconfigjson"]))["auths"]
        except (KeyError, ValueError, TypeError):
            yield bad(f"secret {name} is no registry login", make)
            continue
        if any(registry in host for host in hosts):
            yield good(f"pull secret {name} has a login for {registry}")
        else:
            yield bad(f"pull secret {name} is for {', '.join(hosts)}, not {registry}", make)
    if not profile.image_pull_secrets:
        yield unknown(f"{profile.image}, pulled without a login", "--pull tries it")


def pull(kube: Kube, profile: Profile) -> Iterator[Verdict]:
    """Starts each image once."""
    for image in sorted({profile.image, *(g.image for g in profile.workers.values() if g.image)}):
        yield from _pull(kube, profile, image)


def _pull(kube: Kube, profile: Profile, image: str) -> Iterator[Verdict]:
    """A pod that ends at once; whether it could start says whether its image came."""
    name = job_name("zephyr-pull")
    small = {"cpu": "100m", "memory": "64Mi"}
    container = {
        "name": "pull",
        "image": image,
        "command": ["true"],
        "resources": {"requests": small, "limits": small},
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
    kube.create(kube.path("pods"), pod | {"spec": restricted_pod(profile, container)})
    try:
        began, why = time.monotonic(), "it is still being pulled"
        while time.monotonic() - began < PULL_SECONDS:
            status = kube.get(kube.path("pods", name)).get("status") or {}
            if status.get("phase") in ("Succeeded", "Failed"):
                yield good(f"{image} came in {time.monotonic() - began:.0f} s")
                return
            for container in status.get("containerStatuses") or []:
                waiting = (container.get("state") or {}).get("waiting") or {}
                if waiting.get("reason") in (
                    "ErrImagePull",
                    "ImagePullBackOff",
                    "InvalidImageName",
                ):
                    why = " ".join(str(waiting.get("message", waiting["reason"])).split())[:200]
                    yield bad(f"{image}: {why}", "check image and image_pull_secrets")
                    return
            time.sleep(POLL_SECONDS)
        yield bad(f"{image}: {why} after {PULL_SECONDS} s", f"kubectl describe pod {name}")
    finally:
        kube.delete(kube.path("pods", name))
