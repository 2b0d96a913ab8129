"""Tests the lock of a storage: who may take it, when it expires, how a stale owner finds out."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray import lease as leases
from zephyr_ray import lease_owner, pipeline
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.lease import Lease
from zephyr_ray.store import LEASE, Store

HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from zephyr_ray.lease import Lease
with Lease(Path(sys.argv[1]), "the storage", renew=0.1).held():
    print("held", flush=True)
    time.sleep(100)
"""
NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int fd, int op) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


def quick(folder: Path, expire: float = 0.5) -> Lease:
    return Lease(folder, "the storage", renew=0.05, expire=expire, poll=0.02)


def refused(lease: Lease, wait: float = 0) -> str:
    with pytest.raises(Temporary) as error, lease.held(wait):
        pass
    return str(error.value)


def wait_for_state(process: subprocess.Popen[bytes], letter: str) -> None:
    """Waits until the kernel reports a state, such as T, stopped, or Z, a zombie."""
    deadline = time.monotonic() + 60
    while f"State:\t{letter}" not in Path(f"/proc/{process.pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lease_files(folder: Path) -> list[Path]:
    """Returns the files of a lease, without one with which its owner may just read the time."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes owners look like processes on other machines, which may be alive or dead."""
    monkeypatch.setattr(lease_owner, "machine", lambda: "")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process that holds the lease in `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_fails_at_once_and_names_the_holder(
    other: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    line = refused(quick(tmp_path))
    assert re.fullmatch(
        rf"the storage is locked by another run \(process {other.pid} on \S+, since 2\S+, renewed "
        r"\d+\.\d s ago\); wait for it to end, or use --wait SECONDS",
        line,
    )


def attempt_of(job: str, folder: Path, began: str = "") -> Lease:
    attempt = began and f"2026-01-01T{began}Z"
    return Lease(folder, "the storage", renew=0.05, expire=0.2, poll=0.02, job=job, attempt=attempt)


def test_an_older_attempt_of_a_job_never_takes_over_from_a_newer(
    elsewhere: None, tmp_path: Path
) -> None:
    """KubeRay has given up on the older attempt, but on a lost node, its entry point may restart
    the program after the newer attempt began."""
    newer = attempt_of("small-abcde", tmp_path, "12:06:01")
    with newer.held():
        older = attempt_of("small-abcde", tmp_path, "12:05:00")
        assert "a newer attempt of small-abcde uses the storage" in refused(older, wait=5)
    assert "a newer attempt" in refused(older, wait=5)  # nor after the newer one has ended
    with attempt_of("small-abcde", tmp_path, "12:06:01").held():
        pass


def test_an_older_attempt_never_takes_over_from_a_newer_one_that_stopped_renewing(
    elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = attempt_of("small-abcde", tmp_path, "12:06:01")
    monkeypatch.setattr(newer, "_keep", lambda on_loss: None)
    with newer.held():
        assert "a newer attempt" in refused(attempt_of("small-abcde", tmp_path, "12:05:00"), wait=5)
        with attempt_of("small-abcde", tmp_path, "12:06:01").held(wait=5):
            pass


@pytest.mark.parametrize(
    ("owner", "owner_began", "began"),
    [
        ("", "12:06:01", "12:05:00"),
        ("other-abcde", "12:06:01", "12:05:00"),
        # The clocks of two heads differ.
        ("small-abcde", "12:06:00", "12:05:00"),
        # Not a time: a mistake in a user's own entry point.
        ("small-abcde", "later", "12:05:00"),
        ("small-abcde", "12:06:01", "sooner"),
    ],
)
def test_only_a_clearly_newer_attempt_of_the_same_job_has_precedence(
    tmp_path: Path, owner: str, owner_began: str, began: str
) -> None:
    with attempt_of(owner, tmp_path, owner_began).held():
        pass
    with attempt_of("small-abcde", tmp_path, began).held():
        pass


def test_a_run_names_the_rayjob_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEPHYR_JOB", "small-abcde")
    monkeypatch.setenv("ZEPHYR_ATTEMPT", "2026-01-01T12:05:00Z")
    store = Store(tmp_path)
    store.prepare()
    with store.exclusive():
        [file] = lease_files(store.root / LEASE)
        owner = json.loads(file.read_text())
        assert (owner["job"], owner["attempt"]) == ("small-abcde", "2026-01-01T12:05:00Z")


def test_the_lock_of_a_killed_run_is_free_at_once(
    other: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    other.kill()
    wait_for_state(other, "Z")  # still a zombie: nobody has waited for it
    begun = time.monotonic()
    with Lease(tmp_path, "the storage").held():
        assert time.monotonic() - begun < 60


def test_a_process_that_got_the_pid_of_a_dead_owner_is_not_the_owner(
    other: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    other.send_signal(signal.SIGSTOP)  # so that it does not overwrite the file
    wait_for_state(other, "T")
    [path] = lease_files(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "started": "1"}))
    with quick(tmp_path).held():
        pass


@pytest.mark.parametrize("code", ["38", "37"], ids=["ENOSYS", "ENOLCK"])
def test_storage_without_flock_is_locked_and_freed(code: str, tmp_path: Path) -> None:
    (tmp_path / "noflock.c").write_text(NO_FLOCK)
    library = tmp_path / "noflock.so"
    subprocess.run(["g++", "-xc", "-shared", "-fPIC", "-o", library, f"{library.stem}.c"],
                   cwd=tmp_path, check=True)  # fmt: skip
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom zephyr_ray.store import Store\n"
        "store = Store(Path(sys.argv[1]))\nstore.prepare()\n"
        "with store.exclusive():\n    print('held', flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"LD_PRELOAD": str(library), "FLOCK_ERRNO": code}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment,
                              capture_output=True)  # fmt: skip
        assert (done.stdout, done.stderr) == (b"held\n", b"")


def test_a_released_lock_is_taken_under_the_next_number(tmp_path: Path) -> None:
    for _ in range(3):
        with quick(tmp_path).held():
            pass
    with quick(tmp_path).held():
        names = [path.name for path in lease_files(tmp_path)]
    assert names == ["000001.released", "000002.released", "000003.released", "000004"]


def test_old_numbers_are_removed(tmp_path: Path) -> None:
    for number in range(5, 8):
        (tmp_path / f"{number:06d}.released").touch()
    (tmp_path / f"{leases.KEPT + 5:06d}.released").touch()
    with quick(tmp_path).held():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("000007.released", "000105.released", "000106.released")
    ]


def test_a_silent_owner_elsewhere_loses_the_lock(tmp_path: Path, elsewhere: None) -> None:
    (tmp_path / "000001").write_text("")  # killed before it wrote its name
    os.utime(tmp_path / "000001", (time.time() - 100,) * 2)
    begun = time.monotonic()
    with quick(tmp_path, expire=60).held():
        assert 0.1 < time.monotonic() - begun < 30


def test_a_job_waits_until_a_dead_owners_lease_expires(tmp_path: Path, elsewhere: None) -> None:
    (tmp_path / "000001").write_text("dead a moment ago")
    os.utime(tmp_path / "000001", (time.time() + 3600,) * 2)  # by a clock that was ahead
    assert "locked by another run" in refused(quick(tmp_path))
    lines: list[str] = []
    begun = time.monotonic()
    with quick(tmp_path).held(60, lines.append):
        assert 0.5 < time.monotonic() - begun < 30
    [line] = lines
    assert line.startswith("waiting for the storage, locked by another run")


def test_a_job_waits_until_the_lock_is_released(tmp_path: Path) -> None:
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with quick(tmp_path).held():
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    assert "locked by another run" in refused(quick(tmp_path), wait=0.2)
    threading.Timer(0.2, done.set).start()
    with quick(tmp_path).held(60):
        pass
    thread.join()


def test_an_owner_whose_clock_is_behind_keeps_the_lock(
    tmp_path: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quick(tmp_path).held():
        here = Lease(tmp_path, "the storage", renew=5, expire=60, poll=0.02)
        monkeypatch.setattr(here, "_clock", lambda: time.time() + 3600)
        assert "locked by another run" in refused(here)


def test_an_owner_that_is_alive_here_keeps_the_lock_even_if_it_is_stopped(
    other: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    other.send_signal(signal.SIGSTOP)  # like Ctrl-Z
    wait_for_state(other, "T")
    assert "locked by another run" in refused(quick(tmp_path, expire=0.2), wait=0.6)


def test_one_of_many_takes_over_an_expired_lease(tmp_path: Path, elsewhere: None) -> None:
    (tmp_path / "000001").write_text("")
    os.utime(tmp_path / "000001", (time.time() - 100,) * 2)
    outcomes: list[str] = []
    barrier, over = threading.Barrier(8), threading.Event()

    def contend() -> None:
        barrier.wait()
        try:
            with quick(tmp_path, expire=30).held():
                outcomes.append("held")
                over.wait(60)
        except Temporary as error:
            outcomes.append(str(error)[:33])

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(outcomes) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", *["the storage is locked by another "] * 7]


@pytest.mark.parametrize("loss", ["a higher number", "a deleted folder", "a deleted file"])
def test_an_owner_that_lost_the_lock_is_notified(loss: str, tmp_path: Path) -> None:
    lost = threading.Event()
    lease = quick(tmp_path / "lease")
    with lease.held(on_loss=lost.set):
        lease.check()
        if loss == "a higher number":
            (tmp_path / "lease" / "000002").touch()
        elif loss == "a deleted folder":
            (tmp_path / "lease").rename(tmp_path / "gone")
        else:
            (tmp_path / "lease" / "000001").unlink()
        with pytest.raises(Temporary, match="no longer holds the lock of the storage: another"):
            lease.check()
        assert lost.wait(30) and lease.lost


def test_a_read_error_of_the_storage_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> list[str]:
        raise OSError(5, "Input/output error")

    lease = quick(tmp_path)
    with lease.held(), monkeypatch.context() as patch:
        patch.setattr("os.listdir", fail)
        with pytest.raises(Temporary, match=r"cannot read the lock of the storage \(Input/out"):
            lease.check()


def test_storage_that_cannot_be_locked_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    store = Store(tmp_path)
    with pytest.raises(Permanent, match=r"cannot lock .* \(No space left on device\); correct it"):
        store.exclusive().__enter__()
    assert list((store.root / ".lease").iterdir()) == []


def test_a_stale_run_commits_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    folder = store.folder("text", "k")
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}\n")
    with store.exclusive():
        (store.root / ".lease" / "000002").touch()
        with pytest.raises(
            Temporary, match=f"no longer holds the lock of storage folder {tmp_path}"
        ):
            store.commit("text", "k")
    assert store.find("text", "k") is None


def test_a_stale_run_is_interrupted_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zephyr_ray.store.Lease", partial(Lease, renew=0.05))
    store = Store(tmp_path)
    store.prepare()
    # As shells do for background jobs.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Temporary, match="no longer holds the lock"), store.exclusive():
            (store.root / ".lease" / "000002").touch()
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt), Store(tmp_path / "b").exclusive():
        raise KeyboardInterrupt


def test_the_pipeline_waits_for_the_given_seconds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: {prompts: {kind: prompts, seeds: none.jsonl, count: 1}}\n")
    store = Store(tmp_path / "runs")
    store.prepare()
    arguments = [str(recipe), "--set", f"storage={store.storage}"]
    with store.exclusive():
        assert pipeline.main(arguments) == 1
        [line] = capfd.readouterr().err.splitlines()
        assert re.match(r"error: storage folder \S+ is locked by another run \(process \d+", line)
        assert caplog.messages == []
        assert pipeline.main([*arguments, "--wait", "0.5"]) == 1
    [line] = caplog.messages
    assert line.startswith(f"waiting for storage folder {store.storage}, locked by another run")


def test_a_number_that_was_taken_and_released_meanwhile_is_not_reused(tmp_path: Path) -> None:
    late, other = Lease(tmp_path, "it"), Lease(tmp_path, "it")
    seen = late._holder().number
    with other.held():
        pass
    with other.held():
        assert not late._create(seen + 1)
        other.check()
    with late.held():
        late.check()


def test_a_lease_is_renewed_if_no_file_can_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(tmp_path, "it", renew=0.02)
    with lease.held():
        file = lease._path(lease._number)

        def refuse(self: Path, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "touch", refuse)
        before = file.read_text()
        deadline = time.monotonic() + 60
        while file.read_text() in (before, "") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert file.read_text() != before


def test_a_storage_hiccup_does_not_end_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(tmp_path, "it", poll=0.01)
    holder, failures = lease._holder, [OSError(116, "Stale file handle")]

    def look() -> Any:
        if failures:
            raise failures.pop()
        return holder()

    monkeypatch.setattr(lease, "_holder", look)
    with lease.held(wait=60):
        lease.check()
    failures.append(OSError(116, "Stale file handle"))
    with pytest.raises(OSError, match="Stale"), lease.held():
        pass


def test_the_same_pid_in_another_namespace_is_not_known_to_be_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container on the same host, with the same host name but another pid namespace."""
    with quick(tmp_path).held():
        owner = leases.Owner.model_validate_json((tmp_path / "000001").read_bytes())
    assert owner.is_alive() is True
    gone = owner.model_copy(update={"pid": 2**22 + 1})  # above any pid
    assert gone.is_alive() is False
    link = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: f"other {link(path)}")
    assert owner.is_alive() is None and gone.is_alive() is None


def test_a_process_of_another_user_may_be_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quick(tmp_path).held():
        owner = leases.Owner.model_validate_json((tmp_path / "000001").read_bytes())

    def kill(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert owner.is_alive() is None
