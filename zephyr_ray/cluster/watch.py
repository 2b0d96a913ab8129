"""Watches a RayJob until it ends, through retries, lost watches and timeouts."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from zephyr_ray.cluster.kube import Gone, Kube, Missing, Refused
from zephyr_ray.cluster.logs import submitters
from zephyr_ray.errors import Permanent, Temporary

JOBS = "ray.io/v1/rayjobs"
STARTING_SECONDS, RUNNING_SECONDS = 10, 60
"""Seconds per watch, before the job runs and while it runs; between watches, start problems are
reported."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the first retry, doubled per retry up to the maximum."""
REFUSED_SECONDS = 120.0
"""Seconds for which refusals are tolerated while a job is followed: an API server refuses valid
credentials just after its start, and a token may expire before its file is rewritten."""
OF_NODES = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox")
"""Reasons of the events that tell why a pod does not start on its node; the pod's status says only
ContainerCreating."""
EXIT_STOPPED, EXIT_DEADLINE, EXIT_USER_ERROR = 130, 124, 2
"""Exit codes: stopped or deleted (as for Ctrl-C), deadline exceeded (as `timeout`), invalid
RayJob."""


@dataclass(frozen=True)
class State:
    """Holds what KubeRay reports about a RayJob."""

    name: str
    deployment_status: str
    """KubeRay's jobDeploymentStatus: Initializing, Running, Retrying, Suspended, Complete, Failed,
    ValidationFailed; also Deleted (ours), or empty."""
    job: str
    """Ray's job status: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED, or empty."""
    reason: str = ""
    """KubeRay's reason for a failure, such as DeadlineExceeded, or empty."""
    message: str = ""
    """KubeRay's or Ray's message about the status, or empty."""
    failed: int = 0
    """Number of failed attempts."""
    cluster: str = ""
    """Name of the current Ray cluster."""
    created: str = ""
    """Creation time of the RayJob, in RFC 3339, or empty."""

    @classmethod
    def of(cls, job: dict[str, Any], deployment_status: str | None = None) -> "State":
        status, metadata = job.get("status") or {}, job.get("metadata") or {}
        return cls(
            name=metadata.get("name", ""),
            deployment_status=deployment_status or status.get("jobDeploymentStatus") or "",
            job=status.get("jobStatus") or "",
            reason=status.get("reason") or "",
            message=status.get("message") or "",
            failed=int(status.get("failed") or 0),
            cluster=status.get("rayClusterName") or "",
            created=metadata.get("creationTimestamp", ""),
        )

    @property
    def ended(self) -> bool:
        # Failed is final: if retries are left, KubeRay sets Retrying in the same update.
        return self.deployment_status in ("Complete", "Failed", "ValidationFailed", "Deleted")

    @property
    def exit_code(self) -> int:
        """Exit code of an ended job: the program's own if Ray reported it."""
        if self.deployment_status == "ValidationFailed":
            return EXIT_USER_ERROR
        if self.deployment_status == "Deleted" or self.job == "STOPPED":
            return EXIT_STOPPED
        if self.deployment_status == "Complete" and self.job == "SUCCEEDED":
            return 0
        if self.reason == "DeadlineExceeded":
            return EXIT_DEADLINE
        own = re.search(r"failed with exit code (-?\d+)", self.message)
        code = int(own[1]) if own else 1
        # A negative code is the signal that ended the process; shells report 128 + signal.
        return (128 - code if code < 0 else code) or 1

    def __str__(self) -> str:
        words = [self.deployment_status.lower() or "waiting for the operator"]
        words += [f"job {self.job.lower()}"] if self.job else []
        attempts = "attempt" if self.failed == 1 else "attempts"
        words += [f"after {self.failed} failed {attempts}"] if self.failed else []
        words += [f"on {self.cluster}"] if self.cluster and not self.ended else []
        first = self.message.split("\n")[0].strip()[:300]
        why = " · ".join(filter(None, (self.reason, first)))
        return ", ".join(words) + (
            f": {why}" if why and self.deployment_status != "Complete" else ""
        )


def states(kube: Kube, name: str, say: Callable[[str], None]) -> Iterator[State]:
    """Yields the states of an existing job until the job ends. Yields the state again after each
    watch, even if unchanged.

    Retries after Temporary errors and refusals. Raises Permanent if the server refuses for longer
    than REFUSED_SECONDS.
    """
    pause, lost, refused_since = FIRST_PAUSE, False, None
    # If the first request finds no job, it was deleted before its state was known.
    last = State(name, deployment_status="Deleted", job="")
    while True:
        try:
            job = kube.get(kube.path(JOBS, name))
            yield (last := State.of(job))
            if last.ended:
                return
            query = {
                "fieldSelector": f"metadata.name={name}",
                "resourceVersion": (job.get("metadata") or {}).get("resourceVersion", ""),
            }
            seconds = RUNNING_SECONDS if last.job == "RUNNING" else STARTING_SECONDS
            for kind, job in kube.watch(kube.path(JOBS), seconds, **query):
                yield (last := State.of(job, "Deleted" if kind == "DELETED" else None))
                if last.ended:
                    return
            pause, lost, refused_since = FIRST_PAUSE, False, None
        except Missing:
            yield State(
                name=name,
                deployment_status="Deleted",
                job=last.job,
                failed=last.failed,
                created=last.created,
            )
            return
        except Gone:  # expected after a quiet time, so not reported
            refused_since = None
            time.sleep(FIRST_PAUSE)
        except (Refused, Temporary) as error:
            if not isinstance(error, Refused):
                refused_since = None
            elif refused_since is None:
                refused_since = time.monotonic()
            elif time.monotonic() - refused_since > REFUSED_SECONDS:
                raise Permanent(
                    f"{error}; {name} keeps running; reconnect with zephyr logs {name} --follow"
                ) from None
            if not lost:
                say(f"{error}; retrying while the job keeps running")
            lost = True
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def start_problems(kube: Kube, state: State) -> list[str]:
    """Returns why a job is not running yet: the operator's warnings, such as pods refused by a
    quota or a policy, and pods that cannot start."""
    try:
        # The submitter's Job has the name of the RayJob; refused Ray pods appear on the RayCluster.
        names = [name for name in (state.name, state.cluster) if name]
        selectors = [f"involvedObject.name={name},type=Warning" for name in names]
        events = [e for s in selectors for e in kube.items(kube.path("events"), fieldSelector=s)]
        lines = [_event_line(event) for event in events if _delays(event, state)]
        pods = submitters(kube, state.name)
        if state.cluster:
            label = f"ray.io/cluster={state.cluster}"
            pods = kube.items(kube.path("pods"), labelSelector=label) + pods
        lines += [line for pod in pods for line in _pod_problems(pod)]
        for name in [pod["metadata"]["name"] for pod in pods if _is_pending(pod)]:
            selector = f"involvedObject.name={name},type=Warning"
            events = kube.items(kube.path("events"), fieldSelector=selector)
            lines += [f"{name}: {_event_line(e)}" for e in events if e.get("reason") in OF_NODES]
    except (Permanent, Temporary):
        # Without permission, or if the API server fails, follow the job without these hints.
        return []
    return list(dict.fromkeys(" ".join(line.split())[:500] for line in lines))


def _delays(event: dict[str, Any], state: State) -> bool:
    """Returns whether a warning concerns the attempt that is starting. The operator deletes the
    objects of an earlier attempt, and warns even if one is already gone."""
    if not str(event.get("reason", "")).startswith("FailedToDelete"):
        return True
    deletes = state.deployment_status in ("Retrying", "Suspending")
    return deletes and "not found" not in str(event.get("message", ""))


def _event_line(event: dict[str, Any]) -> str:
    # Each attempt to create a pod uses a new random name, so the same cause would look new.
    message = re.sub(r'(pods "[^"]*-)[^"-]*"', r'\1…"', str(event.get("message", "")))
    return f"{event.get('reason', '')}: {message}"


def _is_pending(pod: dict[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") == "Pending"


def _pod_problems(pod: dict[str, Any]) -> Iterator[str]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"{name} is not scheduled: {condition.get('message', '')}"
    for container in [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            yield f"{name}: {waiting['reason']}: {waiting.get('message', '')}"
