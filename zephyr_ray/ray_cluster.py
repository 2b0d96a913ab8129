"""Connects this process to the cluster at RAY_ADDRESS, or starts one on this machine."""

import logging
import os
import re
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent, Temporary

OBJECT_STORE_BYTES = 512 * 1024**2
"""Object store size in bytes for a cluster started here; small, because only text rows pass through
it."""
CONNECT_SECONDS = 10
"""Maximum seconds to wait for an answer at RAY_ADDRESS."""
SOCKET_PATH_BYTES = 107
"""Maximum bytes of the path of a Unix socket."""
SESSION_BYTES = 2**20
"""Free bytes of disk that Ray needs to start."""

OUT_OF_MEMORY = ("out of memory", "running low on memory", "can't allocate memory")
"""Parts of the messages of CUDA, of Ray's memory monitor, and of PyTorch on a CPU."""


def blames_memory(error: BaseException) -> bool:
    """Returns whether an error of a remote process says that it ran out of memory."""
    return any(part in str(error).lower() for part in OUT_OF_MEMORY)


def cluster_address() -> str | None:
    """Returns the address of the cluster to join; None if one is started on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def temporary_folder() -> Path:
    """Returns the folder for sockets, logs and spilled objects of a cluster started here."""
    temporary = os.environ.get("TMPDIR", tempfile.gettempdir())
    return Path(os.environ.get("RAY_TMPDIR", temporary), "ray")


def check_cluster() -> None:
    """Raises Temporary if the cluster at RAY_ADDRESS does not answer, Permanent if RAY_ADDRESS is
    invalid or no cluster can be started here; Ray would retry for many minutes."""
    if address := cluster_address():
        _check_reachable(address)
    else:
        _check_temporary_folder(temporary_folder())


def _check_reachable(address: str) -> None:
    if address == "auto":
        return
    host_port = re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address)
    if not host_port:
        raise Permanent(
            f"cannot join Ray at {address}: not host:port, ray://host:port or auto; correct "
            "RAY_ADDRESS, or unset it to start Ray here"
        )
    try:
        host, port = host_port[1].strip("[]"), int(host_port[2])
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise Temporary(f"cannot join Ray at {address}: {error}; check RAY_ADDRESS") from None


def _check_temporary_folder(folder: Path) -> None:
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    excess = len(os.fsencode(folder / session / "sockets" / "plasma_store")) - SOCKET_PATH_BYTES
    if excess > 0:
        raise Permanent(
            f"cannot start Ray in {folder}: the path is {excess} bytes too long for its sockets; "
            "set RAY_TMPDIR to a shorter folder, such as /tmp"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(SESSION_BYTES))
    except OSError as error:
        raise Permanent(
            f"cannot start Ray in {folder}: {error.strerror}; set RAY_TMPDIR to a writable folder "
            "with free space"
        ) from None


def connect(cpus: int | None = None) -> None:
    """Joins or starts the cluster, once. A cluster started here ends with this process.

    `cpus` overrides the number of CPUs of a cluster started here.
    """
    # Silences Ray's C++ logs, whose alarming lines about actors would appear in the live table.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    from ray.data import DataContext

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    address = cluster_address()
    # Without "local", Ray joins any cluster that runs on this machine.
    options["address"] = address or "local"
    if not address:
        options |= {"num_cpus": cpus, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    check_cluster()
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises no more specific class
        reason = " ".join(str(error).split())[:300]
        if address:
            raise Temporary(f"cannot join Ray at {address}: {reason}; check RAY_ADDRESS") from error
        raise Permanent(f"cannot start Ray: {reason}; free memory or CPUs") from error
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray deprecates unnamed actor options of `map_batches`, such as `max_restarts`, but 2.60 has no
    # other way to limit the restarts of a pool's actors.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    # Our progress table shows rows, Ray's shows blocks.
    DataContext.get_current().enable_progress_bars = False
