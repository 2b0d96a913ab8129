"""Connects this process to the cluster at RAY_ADDRESS, or starts one on this machine."""

import logging
import os
import re
import socket
import warnings
from typing import Any

from zephyr_ray.errors import Permanent

OBJECT_STORE_BYTES = 512 * 1024**2
"""Object store size in bytes for a cluster started here; small, because only text rows pass through
it."""
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
        raise Permanent(f"cannot join Ray at {address}: {error}; check RAY_ADDRESS") from None


def connect(cpus: int | None = None) -> None:
    """Joins or starts the cluster, once. A cluster started here ends with this process.

    `cpus` overrides the number of CPUs of a cluster started here.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # silences Ray's C++ logs
    import ray
    from ray.data import DataContext

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Without "local", Ray joins any cluster that runs on this machine.
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    check_reachable()
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises no narrower class
        reason = " ".join(str(error).split())[:300]
        if address:
            raise Permanent(f"cannot join Ray at {address}: {reason}; check RAY_ADDRESS") from error
        raise Permanent(f"cannot start Ray: {reason}; free memory or CPUs") from error
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray deprecates unnamed actor options of `map_batches`, such as `max_restarts`, but 2.60 has no
    # other way to limit the restarts of a pool's actors.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    # Our progress table shows rows, Ray's shows blocks.
    DataContext.get_current().enable_progress_bars = False
