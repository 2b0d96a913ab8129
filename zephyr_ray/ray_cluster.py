"""Connect this process to the cluster at RAY_ADDRESS, or start one on this machine."""

import logging
import os
import re
import socket
import warnings
from typing import Any

from zephyr_ray.errors import Permanent

OBJECT_STORE_BYTES = 512 * 1024**2
"""Bytes of object store in a cluster of our own, which carries only rows of text."""
CONNECT_SECONDS = 10
"""Maximum seconds to wait for an answer at RAY_ADDRESS."""


def check_reachable() -> None:
    """Raises Permanent if nothing answers at RAY_ADDRESS; Ray would retry for many minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host_port = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if not host_port:
        return  # unset, or "auto"
    try:
        host, port = host_port[1].strip("[]"), int(host_port[2])
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise Permanent(f"no Ray at {address} ({error}); check RAY_ADDRESS") from None


def connect(cpus: int | None = None) -> None:
    """Joins or starts the cluster, once. A cluster of our own ends with this process.

    `cpus` overrides the number of CPUs of a cluster of our own.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # silences it in our terminal
    import ray
    from ray.data import DataContext

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        # Without "local", Ray joins any cluster that runs on this machine.
        quiet |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        quiet |= {"object_store_memory": OBJECT_STORE_BYTES}
    check_reachable()
    try:
        ray.init(**quiet)
    except Exception as error:  # Ray raises no narrower class
        reason = " ".join(str(error).split())[:300]
        raise Permanent(
            f"Ray does not start: {reason}; try again when the machine is less busy"
        ) from error
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray 2.60 has no other way to limit the restarts of a pool's actors.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    DataContext.get_current().enable_progress_bars = False  # our table shows rows, not blocks
