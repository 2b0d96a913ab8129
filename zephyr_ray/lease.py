"""Locks a shared folder with a numbered lease, because Lustre and NFS may lack flock.

    <folder>/000007             held; names its owner, which rewrites the file every RENEW_SECONDS
    <folder>/000006.released    an earlier lease

Whoever creates the next number owns the folder, and a file can be created only once. A lease ends
when its owner releases it, has died on this machine, or has not renewed it for EXPIRE_SECONDS. An
owner that was only slow finds a higher number than its own, and stops before it writes a result.
"""

import contextlib
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from zephyr_ray.errors import Temporary
from zephyr_ray.formatting import duration
from zephyr_ray.lease_owner import Owner, now

RENEW_SECONDS, EXPIRE_SECONDS = 10.0, 90.0
"""Seconds between two renewals, and seconds without one after which a lease expires: nine tries,
because a thread may wait long for the interpreter or the storage."""
RELEASED = ".released"
NAME = re.compile(r"(\d+)(\.released)?")
KEPT = 100
"""Number of earlier lease files to keep: NFS may list a folder as it was a minute ago."""


@dataclass(frozen=True)
class Holder:
    """The lease with the highest number in the folder, as last read."""

    number: int
    released: bool = True
    text: bytes = b""
    idle: float = 0
    """Seconds since the last renewal, by the clock of the file system."""

    def is_alive(self) -> bool | None:
        """Returns whether the lease is held; None if this machine cannot know."""
        if self.released:
            return False
        owner = self.owner()
        return owner.is_alive() if owner else None

    def __str__(self) -> str:
        owner = self.owner()
        who = f"process {owner.pid} on {owner.host}, since {owner.taken}, " if owner else ""
        return f"{who}renewed {duration(max(0, self.idle))} ago"

    def owner(self) -> Owner | None:
        """Returns the present or last owner; None while the file is being written."""
        try:
            return Owner.model_validate_json(self.text)
        except ValidationError:
            return None


class Lease:
    """The lock of `what`, kept in `folder`. `job` and `attempt` are the name of the RayJob, if any,
    and the time at which this attempt of it began; `poll` is the seconds between two checks of the
    owner."""

    def __init__(
        self,
        folder: Path,
        what: str,
        renew: float = RENEW_SECONDS,
        expire: float = EXPIRE_SECONDS,
        poll: float = 1.0,
        job: str = "",
        attempt: str = "",
    ):
        self.folder, self.what, self.lost = folder, what, False
        self._job, self._attempt = job, attempt or now("microseconds")
        self._renew, self._expire, self._poll = renew, expire, poll
        self._number, self._taken, self._stop = 0, "", threading.Event()

    @contextmanager
    def held(
        self,
        wait: float = 0,
        notice: Callable[[str], None] = lambda line: None,
        on_loss: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Holds the lease. Waits up to `wait` seconds for another owner, then raises Temporary;
        raises OSError if the folder cannot be written.

        `notice` gets a line when it waits; a thread calls `on_loss` if another owner took over.
        """
        self._take(wait, notice)
        self._stop.clear()
        thread = threading.Thread(target=self._keep, args=(on_loss,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            with contextlib.suppress(OSError):
                path = self._path(self._number)
                path.rename(path.with_suffix(RELEASED))

    def check(self) -> None:
        """Raises Temporary if another owner has taken over, or if the storage cannot be read."""
        try:
            held = self._is_held()
        except OSError as error:
            raise Temporary(
                f"cannot read the lock of {self.what} ({error.strerror}); check the storage"
            ) from None
        if not held:
            raise Temporary(
                f"this run no longer holds the lock of {self.what}: another run took it over, or "
                f"{self.folder} was deleted; let the other run end"
            )

    def _take(self, wait: float, notice: Callable[[str], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = changed = time.monotonic()
        last, announced = None, -1
        while True:
            now = time.monotonic()
            try:
                holder = self._holder()
            except OSError:  # the storage may answer again while there is time to wait
                if now - begun >= wait:
                    raise
                time.sleep(self._poll)
                continue
            self._give_way(holder)
            if last and (last.number, last.text) != (holder.number, holder.text):
                changed = now
            last, alive = holder, holder.is_alive()
            # Some file systems use the hosts' clocks, which differ: also watch a silent owner.
            silent = alive is None and holder.idle > self._expire and changed == begun
            patience = 2 * self._renew if silent else self._expire
            if alive is False or (alive is None and now - changed > patience):
                if self._create(holder.number + 1):
                    return
                continue
            if not silent and now - begun >= wait:
                raise Temporary(
                    f"{self.what} is locked by another run ({holder}); wait for it to end, or use "
                    "--wait SECONDS"
                )
            if holder.number != announced:
                notice(f"waiting for {self.what}, locked by another run ({holder})")
                announced = holder.number
            time.sleep(self._poll)

    def _give_way(self, holder: Holder) -> None:
        """Raises Temporary if a newer attempt of the same job holds, or held, the lease."""
        owner = holder.owner()
        if owner and owner.is_newer_attempt(self._job, self._attempt):
            raise Temporary(f"a newer attempt of {self._job} uses {self.what}; follow that one")

    def _create(self, number: int) -> bool:
        """Takes a number. Returns False if another process has it."""
        path = self._path(number)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        self._number, self._taken, self.lost = number, now("seconds"), False
        try:
            self._write(descriptor)
        except BaseException:
            path.unlink()
            raise
        if not self._is_held():  # the number was taken and released since the folder was listed
            path.unlink()
            return False
        for other, name in self._names():
            if other <= number - KEPT:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
        return True

    def _keep(self, on_loss: Callable[[], None]) -> None:
        """Renews the lease until it is released or lost."""
        while not self._stop.wait(self._renew):
            # Storage that does not respond may recover; other runs decide when the lease expires.
            with contextlib.suppress(OSError):
                if not self._is_held():
                    self.lost = True
                    on_loss()
                    return
                self._write(os.open(self._path(self._number), os.O_WRONLY))

    def _is_held(self) -> bool:
        try:
            with contextlib.suppress(OSError):  # a full disk lets nobody create a file
                self._clock()
            return max(self._names(), default=None) == (self._number, self._path(self._number).name)
        except FileNotFoundError:  # someone deleted the folder
            return False

    def _write(self, descriptor: int) -> None:
        """Rewrites the owner at the same length, so that a full disk does not matter."""
        owner = Owner.this_process(self._taken, self._job, self._attempt)
        with open(descriptor, "wb") as file:
            file.write(owner.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _holder(self) -> Holder:
        now = self._clock()
        while True:
            number, name = max(self._names(), default=(0, RELEASED))
            path, released = self.folder / name, name.endswith(RELEASED)
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                return Holder(number, released, path.read_bytes(), now - path.stat().st_mtime)
            if not number:
                return Holder(number)

    def _clock(self) -> float:
        """Returns the time of the file system. A new file also makes NFS list the folder anew."""
        probe = self.folder / f".{uuid.uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _names(self) -> list[tuple[int, str]]:
        """Returns the numbers that were taken and the names of their files."""
        matches = [NAME.fullmatch(name) for name in os.listdir(self.folder)]
        return [(int(match[1]), match[0]) for match in matches if match]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yields a function with which another thread raises KeyboardInterrupt in the main thread.

    It sends a signal, because only a signal also interrupts a system call of the main thread. The
    signal is not SIGINT (Ctrl-C), which shells make background jobs ignore.
    """
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
