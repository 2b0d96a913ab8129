"""Checks that the namespace admits the run's pods: its quotas, limit ranges and queue."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zephyr_ray.cluster.checks import CheckResult, bad, good
from zephyr_ray.cluster.job import SUBMITTER
from zephyr_ray.cluster.kube import Kube, Missing
from zephyr_ray.cluster.profile import Group, Profile, Workers, quantity
from zephyr_ray.formatting import gib

SCOPES = {"NotTerminating", "NotBestEffort"}
"""Scopes of quotas that count these pods, which have no deadline and state their requests."""
OPERATORS_CONTAINER = {"cpu": "200m", "memory": "256Mi"}
"""Requests and limits of the init container that the operator adds to workers."""
QUEUES = "kueue.x-k8s.io"


@dataclass(frozen=True)
class Pods:
    """Pods of one kind, and the amounts that each requests; its limits are the same."""

    name: str
    amounts: dict[str, str]
    placement: Group | None = None
    """Holds their node selector and tolerations, if they have any."""
    count: int = 1


def pods_of(profile: Profile) -> list[Pods]:
    head = {"cpu": profile.head.cpu, "memory": profile.head.memory}
    groups = [
        Pods(f"group {name}", requests(group), group, group.replicas)
        for name, group in profile.workers.items()
    ]
    return [Pods("the submitter", SUBMITTER), Pods("the head", head, profile.head), *groups]


def requests(group: Workers) -> dict[str, str]:
    """Returns what each replica of a worker group requests."""
    amounts = {"cpu": group.cpu, "memory": group.memory}
    return amounts | ({group.gpu.kind: str(group.gpu.count)} if group.gpu else {})


def check_quotas(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks that each quota has room for the run and requires no amount that its pods omit."""
    defaults = {
        key
        for limits in kube.items(kube.path("limitranges"))
        for limit in limits["spec"].get("limits") or []
        for key in limit.get("defaultRequest") or {}
    }
    needs = _needs(profile)
    quotas = kube.items(kube.path("resourcequotas"))
    for quota in quotas:
        name, spec = f"quota {quota['metadata']['name']}", quota.get("spec") or {}
        if spec.get("scopeSelector") or not SCOPES.issuperset(spec.get("scopes") or []):
            continue
        status = quota.get("status") or {}
        hard, used = status.get("hard") or spec.get("hard") or {}, status.get("used") or {}
        free = {key: quantity(hard[key]) - quantity(used.get(key, "0")) for key in hard}
        short = [key for key in free if needs.get(key, 0) > free[key]]
        yield from (
            bad(
                f"{name}: the run needs {_format(key, needs[key])} {key}, "
                f"{_format(key, free[key])} of {hard[key]} are free",
                "raise the quota, wait for the pods that use it, or lower amounts in the profile",
            )
            for key in short
        )
        unstated = [k for k in hard if "ephemeral" in k and "ephemeral-storage" not in defaults]
        if unstated:
            yield bad(
                f"{name} covers {' and '.join(unstated)}, which the run's pods do not state",
                "set a default for ephemeral-storage in a LimitRange of the namespace",
            )
        if not short and not unstated:
            yield good(f"{name} has room for the run")
    if not quotas:
        yield good(f"{kube.namespace} has no quota")


def _needs(profile: Profile) -> dict[str, float]:
    """Returns the run's total of each resource that a quota may name."""
    needs: dict[str, float] = {}
    for pods in pods_of(profile):
        amounts = {kind: quantity(text) for kind, text in pods.amounts.items()} | {"pods": 1}
        for kind, amount in amounts.items():
            for key in (kind, f"requests.{kind}", f"limits.{kind}", f"count/{kind}"):
                needs[key] = needs.get(key, 0) + amount * pods.count
    return needs


def check_limit_ranges(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks that no pod is larger or smaller than a limit range allows."""
    ranges = kube.items(kube.path("limitranges"))
    allowed = True
    for limits in ranges:
        for limit in limits["spec"].get("limits") or []:
            for line in _violations(limit, profile):
                allowed = False
                yield bad(
                    f"limit range {limits['metadata']['name']}: {line}",
                    "change amounts in the profile, or the limit range",
                )
    if allowed:
        yield good("no limit range excludes a pod" if ranges else "no limit range")


def _violations(limit: dict[str, Any], profile: Profile) -> Iterator[str]:
    if limit.get("type") not in ("Container", "Pod"):
        return
    pods = pods_of(profile)
    if limit["type"] == "Container":
        pods.append(Pods("the operator's init container", OPERATORS_CONTAINER))
    for one in pods:
        for kind, amount in one.amounts.items():
            highest, lowest = (limit.get(side, {}).get(kind) for side in ("max", "min"))
            if highest and quantity(amount) > quantity(highest):
                yield f"{one.name} has {kind} {amount}, the maximum is {highest}"
            if lowest and quantity(amount) < quantity(lowest):
                yield f"{one.name} has {kind} {amount}, the minimum is {lowest}"


def check_queue(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks that the profile's queue exists and admits jobs."""
    if not profile.queue:
        return
    try:
        version = kube.get(f"/apis/{QUEUES}")["preferredVersion"]["groupVersion"]
    except Missing:
        yield bad("the profile names a queue, but Kueue is not installed", "install Kueue")
        return
    try:
        queue = kube.get(kube.path(f"{version}/localqueues", profile.queue))
    except Missing:
        yield bad(
            f"no LocalQueue {profile.queue} in {kube.namespace}",
            f"use one from kubectl get localqueues -n {kube.namespace}",
        )
        return
    conditions = (queue.get("status") or {}).get("conditions") or []
    active = [c for c in conditions if c["type"] == "Active"]
    if active and active[0]["status"] == "True":
        yield good(f"LocalQueue {profile.queue} is active")
    else:
        why = active[0].get("message", "") if active else "no status yet"
        yield bad(
            f"LocalQueue {profile.queue} is not active: {why}",
            f"kubectl describe localqueue {profile.queue} -n {kube.namespace}",
        )


def _format(key: str, amount: float) -> str:
    return gib(amount) if "memory" in key else f"{amount:g}"
