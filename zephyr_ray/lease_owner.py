"""Identifies the process that holds a lease, and orders the attempts of a job."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field

JOB_VARIABLE, ATTEMPT_VARIABLE = "ZEPHYR_JOB", "ZEPHYR_ATTEMPT"
"""Environment variables with the name of the RayJob that this process belongs to, and with the time
at which this attempt of it began, in RFC 3339. Restarts by the entry point keep the attempt."""
SKEW_SECONDS = 60
"""Maximum difference between the clocks of two heads: attempts that began this close are not
ordered. The operator takes longer to give up on a head."""


class Owner(BaseModel):
    """The process that holds a lease."""

    host: str
    pid: int = Field(gt=0, lt=2**31)
    machine: str
    """Host, boot and pid namespace, within which `pid` means the same; empty if unknown."""
    started: str
    """Start time of the process, in clock ticks since boot, because its pid may be reused."""
    taken: str
    renewed: str
    job: str = ""
    attempt: str = ""
    """Name of the RayJob, if any, and the time at which this attempt of it began."""

    @classmethod
    def this_process(cls, taken: str, job: str, attempt: str) -> "Owner":
        return cls(
            host=platform.node(),
            pid=os.getpid(),
            machine=machine(),
            started=_start_time(os.getpid()) or "",
            taken=taken,
            renewed=now("microseconds"),
            job=job,
            attempt=attempt,
        )

    def is_newer_attempt(self, job: str, attempt: str) -> bool:
        """Returns whether this is a newer attempt of the same job than the given one; False if
        their times are unknown or too close to tell."""
        try:
            later = datetime.fromisoformat(self.attempt) - datetime.fromisoformat(attempt)
        except (ValueError, TypeError):
            return False
        return self.job == job != "" and later.total_seconds() > SKEW_SECONDS

    def is_alive(self) -> bool | None:
        """Returns whether the process still runs; None if this machine cannot know."""
        if not self.machine or self.machine != machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's process
            return None
        started = _start_time(self.pid)
        return None if started is None else started == self.started


def now(resolution: str) -> str:
    return datetime.now(UTC).isoformat(timespec=resolution)


def machine() -> str:
    """Returns an identifier of this host, its boot and the pid namespace; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Returns the start time of a process, empty if it has ended; None if unknown."""
    try:
        # The name in parentheses may contain anything; state and start time are fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
