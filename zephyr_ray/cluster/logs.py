"""The log of a job: what its driver prints, as the submitter's pod passes it on.

KubeRay starts a new submitter for each retry, and a Job may replace a lost one; the newest pod is
followed, and a broken connection goes on behind the last line shown.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from zephyr_ray.cluster.kube import Kube, Missing
from zephyr_ray.errors import Permanent, Temporary

SILENCE_SECONDS = 60.0
"""After so long without a line the connection is made anew: it may be dead."""
PAUSE_SECONDS = 2.0
LAST_WAIT_SECONDS = 30.0
"""For the rest of the log, once the job has ended."""
STAGE = re.compile(
    r"(?:\d\d:){2}\d\d (\S+): (waiting|cached|running|done|failed|interrupted)\b ?(.*)"
)
"""A line of the pipeline's display where there is no terminal."""


def submitters(kube: Kube, name: str) -> list[dict[str, Any]]:
    """The pods that submitted a job and pass its log on, the newest last."""
    label = f"batch.kubernetes.io/job-name={name}"
    pods = kube.items(kube.path("pods"), labelSelector=label)
    return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))


def log_lines(kube: Kube, pod: str, tail: int | None = None) -> Iterator[str]:
    query = {"tailLines": str(tail)} if tail else {}
    return kube.lines(kube.path("pods", f"{pod}/log"), SILENCE_SECONDS, **query)


def stage_states(lines: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The last (state, note) of each stage that the log tells of, in their order."""
    states: dict[str, tuple[str, str]] = {}
    for line in lines:
        if match := STAGE.match(line):
            states[match[1]] = (match[2], match[3])
    return states


class LogFollower(threading.Thread):
    """Hands each line of a job's log to `show`, once, until `finish`."""

    def __init__(
        self, kube: Kube, name: str, show: Callable[[str], None], say: Callable[[str], None]
    ):
        super().__init__(daemon=True)
        self._kube, self._name, self._show, self._say = kube, name, show, say
        self._ended, self._closed = threading.Event(), threading.Event()

    def finish(self, ended: bool) -> None:
        """Of a job that ended the rest of the log is shown; of another, nothing more."""
        self._ended.set()
        if ended:
            self.join(LAST_WAIT_SECONDS)
        self._closed.set()

    def run(self) -> None:
        complete_pods: set[str] = set()
        progress: dict[str, _Progress] = {}
        while not self._closed.is_set():
            last_look = self._ended.is_set()
            try:
                pods = [
                    p for p in submitters(self._kube, self._name) if _uid(p) not in complete_pods
                ]
                started = [p for p in pods if _phase(p) != "Pending"]
                for pod in started:
                    # A pod that had ended before its log was opened has no more to come.
                    complete = _phase(pod) in ("Succeeded", "Failed")
                    if _uid(pod) not in progress:
                        self._say(f"log of {pod['metadata']['name']}")
                    self._follow(
                        pod["metadata"]["name"], progress.setdefault(_uid(pod), _Progress())
                    )
                    if complete:
                        complete_pods.add(_uid(pod))
                if last_look and not started:
                    return
            except (Missing, Temporary):
                pass  # a pod that went away with its cluster, or a connection: look again
            except Permanent as error:
                self._say(f"no log: {error}")
                return
            self._closed.wait(PAUSE_SECONDS)

    def _follow(self, pod: str, progress: "_Progress") -> None:
        query = {"follow": "true", "timestamps": "true"}
        if progress.time:
            query["sinceTime"] = progress.time[:19] + "Z"  # whole seconds: some lines come again
        path = self._kube.path("pods", f"{pod}/log")
        for line in progress.only_new(self._kube.lines(path, SILENCE_SECONDS, **query)):
            if self._closed.is_set():
                return
            self._show(line)


class _Progress:
    """How far a log was shown: its last time stamp, and how many lines bore it."""

    def __init__(self) -> None:
        self.time, self._count = "", 0

    def only_new(self, lines: Iterable[str]) -> Iterator[str]:
        repeats = self._count
        for line in lines:
            time, _, text = line.partition(" ")
            order = _sortable(time)
            if order < _sortable(self.time):
                continue
            if order == _sortable(self.time):
                if repeats:
                    repeats -= 1
                    continue
                self._count += 1
            else:
                self.time, self._count, repeats = time, 1, 0
            yield text


def _sortable(time: str) -> str:
    """RFC 3339 leaves trailing zeros of the fraction out: 12:00:01.5Z is before 12:00:01.51Z."""
    return time.rstrip("Z").ljust(29, "0") if "." in time else time.rstrip("Z") + "." + "0" * 9


def _uid(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["uid"])


def _phase(pod: dict[str, Any]) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))
