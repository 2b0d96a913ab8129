"""Reads a job's log, which is the driver's output relayed by the submitter pod.

KubeRay starts a new submitter for each retry, and a Job may replace a lost one. The follower reads
each pod once, and after a broken connection resumes after the last line shown.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from zephyr_ray.cluster.kube import Kube, Missing, Refused
from zephyr_ray.errors import Permanent, Temporary

SILENCE_SECONDS = 60.0
"""Seconds without a line after which the connection is reopened, as it may be dead."""
PAUSE_SECONDS = 2.0
"""Seconds between two searches for submitter pods."""
LAST_WAIT_SECONDS = 30.0
"""Maximum seconds to wait for the rest of the log after the job has ended."""
TAIL = 5000
"""Maximum lines, from the end of the log, in which `zephyr status` looks for stages."""


def submitters(kube: Kube, name: str) -> list[dict[str, Any]]:
    """Returns the job's submitter pods, newest last."""
    label = f"batch.kubernetes.io/job-name={name}"
    pods = kube.items(kube.path("pods"), labelSelector=label)
    return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))


def last_lines(kube: Kube, name: str) -> list[str]:
    """Returns the end of the job's log; empty if no pod has started or its log is not readable."""
    with suppress(Permanent, Temporary):
        for pod in submitters(kube, name)[-1:]:
            return list(log_lines(kube, pod["metadata"]["name"], tailLines=str(TAIL)))
    return []


def log_lines(kube: Kube, pod: str, **query: str) -> Iterator[str]:
    """Yields the lines of a pod's log; `query` is for the API, such as tailLines or follow."""
    return kube.lines(kube.path("pods", f"{pod}/log"), SILENCE_SECONDS, **query)


class LogFollower(threading.Thread):
    """Passes each line of a job's log to `show` exactly once, until `finish`."""

    def __init__(
        self, kube: Kube, name: str, show: Callable[[str], None], say: Callable[[str], None]
    ):
        super().__init__(daemon=True)
        self._kube, self._name, self._show, self._say = kube, name, show, say
        self._ended, self._closed = threading.Event(), threading.Event()
        self._progress: dict[str, _Progress] = {}
        self._complete: set[str] = set()
        self._refused = False

    def finish(self, ended: bool) -> None:
        """Stops following. If the job has ended, first shows the rest of the log."""
        self._ended.set()
        if ended:
            self.join(LAST_WAIT_SECONDS)
        self._closed.set()

    def run(self) -> None:
        while not self._closed.is_set():
            last_look = self._ended.is_set()
            try:
                if not self._read_pods() and last_look:
                    return
            except (Missing, Temporary):
                pass  # the pod went away with its cluster, or a connection broke: look again
            except Permanent as error:
                if not self._refused:
                    self._say(f"no log: {error}; trying again while the job runs")
                self._refused = True
                if last_look and not any(progress.since for progress in self._progress.values()):
                    return  # these credentials could never read it
            self._closed.wait(PAUSE_SECONDS)

    def _read_pods(self) -> bool:
        """Shows what is new in the log of each pod. Returns whether a log may be incomplete."""
        incomplete = False
        for pod in submitters(self._kube, self._name):
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            phase = (pod.get("status") or {}).get("phase", "Pending")
            if uid in self._complete or phase == "Pending":
                continue
            incomplete = True
            if uid not in self._progress:
                self._say(f"log of {name}")
            ended = phase in ("Succeeded", "Failed")
            try:
                self._follow(name, self._progress.setdefault(uid, _Progress()))
            except (Missing, Refused):
                raise
            except Permanent as error:
                if not ended:
                    raise
                self._say(f"no log of {name}: {error}")  # it ended before its container started
            # If the pod ended before its log was opened, the log is complete.
            if ended:
                self._complete.add(uid)
        return incomplete

    def _follow(self, pod: str, progress: "_Progress") -> None:
        query = {"follow": "true", "timestamps": "true"}
        if progress.since:
            # The API takes whole seconds only, so some lines repeat.
            query["sinceTime"] = progress.since
        for line in progress.only_new(log_lines(self._kube, pod, **query)):
            if self._closed.is_set():
                return
            self._refused = False
            self._show(line)


class _Progress:
    """Tracks how far a log was shown: the second of the last line, and the time stamps of the lines
    shown since then. Stamps need not ascend: standard output and error race, and a clock may be set
    back, after which lines may repeat, but none is lost."""

    def __init__(self) -> None:
        self.since = ""
        """Second of the last line, in UTC, as the API takes it; empty before the first line."""
        self._shown: Counter[str] = Counter()

    def only_new(self, lines: Iterable[str]) -> Iterator[str]:
        """Yields the text of time-stamped lines that were not shown before."""
        repeats = self._shown.copy()
        for line in lines:
            time, _, text = line.partition(" ")
            second = _second(time)
            if not second:  # a message from the node instead of a log line
                yield line
                continue
            if repeats[time]:
                repeats[time] -= 1
                continue
            if second != self.since:
                self.since = second
                recent = {t: n for t, n in self._shown.items() if _second(t) >= second}
                self._shown = Counter(recent)
            self._shown[time] += 1
            yield text


def _second(time: str) -> str:
    """Returns a time stamp in UTC, cut to whole seconds; empty if it cannot be parsed."""
    try:
        return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    except ValueError:
        return ""
