"""Checks that the cluster has what the profile names: nodes, storage, secrets and images."""

import json
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from typing import Any

from zephyr_ray.cluster.checks import CheckResult, bad, good, unknown
from zephyr_ray.cluster.job import SMALL_TMP, job_name, restricted_pod
from zephyr_ray.cluster.kube import Forbidden, Kube, Missing
from zephyr_ray.cluster.limits import Pods, pods_of
from zephyr_ray.cluster.profile import Profile, quantity
from zephyr_ray.formatting import duration
from zephyr_ray.recipe import Recipe

PULL_SECONDS = 600
"""Maximum seconds to wait for one image."""
POLL_SECONDS = 1.0
NOT_PULLED = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName")


def check_nodes(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks that the nodes, if empty, could hold the pods of each kind, and then all pods
    together."""
    nodes, run = kube.items("/api/v1/nodes"), pods_of(profile)
    fitting = True
    for pods in run:
        fits = sum(_number_on(node, pods) for node in nodes if not _obstacle(node, pods))
        amounts = ", ".join(f"{amount} {kind}" for kind, amount in pods.amounts.items())
        observation = (
            f"{pods.name}: {pods.count} × {amounts}; the nodes, if empty, hold {fits} of these"
        )
        if fits >= pods.count:
            yield good(observation)
            continue
        fitting = False
        obstacles = Counter(
            obstacle
            for node in nodes
            if _number_on(node, pods) and (obstacle := _obstacle(node, pods))
        )
        if obstacles:
            reasons = [f"{obstacle} ({count})" for obstacle, count in obstacles.most_common()]
            yield bad(
                f"{observation}; large enough but excluded: {', '.join(reasons)}",
                "change node_selector or tolerations in the profile, or the nodes",
            )
            continue
        kind = list(pods.amounts)[-1] if len(pods.amounts) > 2 else "cpu"
        yield bad(
            observation,
            f"{sum(_allocatable(node, kind) for node in nodes):g} {kind} allocatable in total: "
            "add nodes (is the GPU operator installed?) or lower amounts in the profile",
        )
    if fitting and (left := _left_over(nodes, run)):
        total = sum(pods.count for pods in run)
        yield bad(
            f"{left} of the run's {total} pods do not fit beside the others, even on empty nodes",
            "add nodes or lower amounts in the profile",
        )


def _left_over(nodes: list[dict[str, Any]], run: list[Pods]) -> int:
    """Returns how many pods fit on no node if the largest are placed first."""
    left = 0
    free = [{kind: _allocatable(n, kind) for p in run for kind in p.amounts} for n in nodes]
    needs = [(p, {kind: quantity(amount) for kind, amount in p.amounts.items()}) for p in run]
    for pods, need in sorted(needs, key=lambda n: (len(n[1]), n[1]["cpu"]), reverse=True):
        allowed = [f for node, f in zip(nodes, free, strict=True) if not _obstacle(node, pods)]
        for _ in range(pods.count):
            room = [f for f in allowed if all(f[kind] >= need[kind] for kind in need)]
            for kind in need if room else ():
                room[0][kind] -= need[kind]
            left += not room
    return left


def _allocatable(node: dict[str, Any], kind: str) -> float:
    return quantity((node.get("status", {}).get("allocatable") or {}).get(kind, "0"))


def _number_on(node: dict[str, Any], pods: Pods) -> int:
    """Returns how many of these pods the node would hold if it were empty."""
    return int(min(_allocatable(node, k) // quantity(n) for k, n in pods.amounts.items()))


def _obstacle(node: dict[str, Any], pods: Pods) -> str:
    """Returns what keeps the pods off the node regardless of its size; empty if nothing does."""
    labels, spec = node["metadata"].get("labels") or {}, node.get("spec") or {}
    selector = pods.placement.node_selector if pods.placement else {}
    tolerations = pods.placement.tolerations if pods.placement else []
    if spec.get("unschedulable"):
        return "cordoned nodes"
    for key, value in selector.items():
        if labels.get(key) != value:
            return f"nodes without the label {key}={value}"
    for taint in spec.get("taints") or []:
        tolerated = any(_tolerates(t, taint) for t in tolerations)
        if taint["effect"] != "PreferNoSchedule" and not tolerated:
            value = f"={taint['value']}" if taint.get("value") else ""
            return f"nodes with the taint {taint['key']}{value}:{taint['effect']}"
    return ""


def _tolerates(toleration: Any, taint: dict[str, str]) -> bool:
    if toleration.effect not in (None, taint["effect"]):
        return False
    if toleration.key is None:
        return bool(toleration.operator == "Exists")
    same = toleration.operator == "Exists" or (toleration.value or "") == taint.get("value", "")
    return toleration.key == taint["key"] and same


def check_storage(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks that the claim is bound, or will be on first use, and is ReadWriteMany."""
    name = profile.storage.claim
    try:
        claim = kube.get(kube.path("persistentvolumeclaims", name))
    except Missing:
        fix = "create a ReadWriteMany claim with that name"
        yield bad(f"no claim {name} in {kube.namespace}", fix)
        return
    modes = claim["spec"].get("accessModes") or []
    phase = claim.get("status", {}).get("phase")
    class_name = claim["spec"].get("storageClassName")
    observation = f"claim {name}: {phase}, {', '.join(modes)}, class {class_name or 'none'}"
    waits = False
    if class_name:
        try:
            storage_class = kube.get(f"/apis/storage.k8s.io/v1/storageclasses/{class_name}")
            waits = storage_class.get("volumeBindingMode") == "WaitForFirstConsumer"
        except Missing:
            if phase != "Bound":
                fix = (
                    f"storage class {class_name} is missing; use one from kubectl get storageclass"
                )
                yield bad(observation, fix)
                return
        except Forbidden:
            pass  # the claim itself says whether it is bound
    if phase == "Lost" or (phase != "Bound" and not waits):
        yield bad(observation, f"see kubectl describe pvc {name} for why it is not bound")
    elif "ReadWriteMany" not in modes:
        fix = "head and workers share it: use a storage class with ReadWriteMany (NFS, CephFS, …)"
        yield bad(observation, f"{fix}, unless the cluster is one node")
    else:
        yield good(observation)


def check_secret_keys(kube: Kube, profile: Profile, recipe: Recipe | None) -> Iterator[CheckResult]:
    """Checks that each variable has a secret in the profile and the secret has the key."""
    variables = recipe.environment_variables() if recipe else {}
    for variable in [v for v in variables if v not in profile.secrets]:
        fix = f"add to secrets in the profile: {variable}: {{name: SECRET, key: KEY}}"
        yield bad(f"the recipe reads {variable}, but the profile has no secret for it", fix)
    for variable, secret in profile.secrets.items():
        command = f"kubectl create secret generic {secret.name} --from-file={secret.key}=FILE"
        command += f" -n {kube.namespace}"
        try:
            data = kube.get(kube.path("secrets", secret.name)).get("data") or {}
        except Missing:
            yield bad(f"{variable}: no secret {secret.name} in {kube.namespace}", command)
            continue
        if not data.get(secret.key):
            keys = ", ".join(sorted(data)) or "none"
            missing = f"{variable}: secret {secret.name} has no {secret.key}; it has {keys}"
            yield bad(missing, command)
        else:
            yield good(f"{variable}: secret {secret.name} has {secret.key}")
    if not profile.secrets and not variables:
        yield good("none needed")


def check_image(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks that each pull secret has a login for the image's registry."""
    first = profile.image.split("/")[0]
    named = "/" in profile.image and ("." in first or ":" in first or first == "localhost")
    registry = first if named else "docker.io"
    for name in profile.image_pull_secrets:
        command = f"kubectl create secret docker-registry {name} --docker-server={registry} …"
        try:
            data = kube.get(kube.path("secrets", name)).get("data") or {}
        except Missing:
            yield bad(f"no pull secret {name} in {kube.namespace}", command)
            continue
        try:
            hosts = json.loads(b64decode(data[".dockerconfigjson"]))["auths"]
        except (KeyError, ValueError, TypeError):
            yield bad(f"secret {name} is not a registry login", command)
            continue
        if any(registry in host for host in hosts):
            yield good(f"pull secret {name} has a login for {registry}")
        else:
            yield bad(f"pull secret {name} is for {', '.join(hosts)}, not {registry}", command)
    if not profile.image_pull_secrets:
        fix = "run zephyr doctor --pull to try it"
        yield unknown(f"{profile.image} is pulled without a login", fix)


def check_pulls(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks each image by starting a pod with it."""
    for image in sorted({profile.image, *(g.image for g in profile.workers.values() if g.image)}):
        yield from _pull(kube, profile, image)


def _pull(kube: Kube, profile: Profile, image: str) -> Iterator[CheckResult]:
    """Starts a pod that exits at once, and deletes it. Pods start only after their image pull."""
    name = job_name("zephyr-pull")
    amounts = {"cpu": "100m", "memory": "64Mi"}
    container = {
        "name": "pull",
        "image": image,
        "command": ["true"],
        "resources": {"requests": amounts, "limits": amounts},
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
    kube.create(kube.path("pods"), pod | {"spec": restricted_pod(profile, container, SMALL_TMP)})
    try:
        started, why = time.monotonic(), "still being pulled"
        while time.monotonic() - started < PULL_SECONDS:
            status = kube.get(kube.path("pods", name)).get("status") or {}
            if status.get("phase") in ("Succeeded", "Failed"):
                yield good(f"{image} was pulled in {duration(time.monotonic() - started)}")
                return
            for container in status.get("containerStatuses") or []:
                waiting = (container.get("state") or {}).get("waiting") or {}
                if waiting.get("reason") in NOT_PULLED:
                    why = " ".join(str(waiting.get("message", waiting["reason"])).split())[:200]
                    fix = "check image and image_pull_secrets in the profile"
                    yield bad(f"{image}: {why}", fix)
                    return
            time.sleep(POLL_SECONDS)
        yield bad(f"{image}: {why} after {PULL_SECONDS} s", f"kubectl describe pod {name}")
    finally:
        kube.delete(kube.path("pods", name))
