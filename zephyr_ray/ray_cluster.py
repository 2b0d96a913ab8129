"""The Ray cluster of this process: the one it was started for, else one on this machine."""

import logging
import os
import re
import socket
import warnings
from typing import Any

from zephyr_ray.errors import Permanent

OBJECT_STORE_BYTES = 512 * 1024**2
"""Of a cluster of our own; only rows of text go through it."""
CONNECT_SECONDS = 10


def check_address() -> None:
    """Permanent where nobody answers at RAY_ADDRESS: Ray itself would try for many minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    place = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if not place:
        return  # none, or "auto"
    try:
        socket.create_connection((place[1].strip("[]"), int(place[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise Permanent(f"no Ray at {address} ({error}); check RAY_ADDRESS") from None


def connect(cpus: int | None = None) -> None:
    """Joins or starts the cluster, once. A cluster of our own ends with this process.

    `cpus` is what a cluster of our own counts, where that is not what the machine has.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of the lines on our own terminal
    import ray
    from ray.data import DataContext

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        # "local": else Ray joins whatever cluster it finds on this machine.
        quiet |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        quiet |= {"object_store_memory": OBJECT_STORE_BYTES}
    check_address()
    try:
        ray.init(**quiet)
    except Exception as error:  # what Ray raises has no narrower class
        told = " ".join(str(error).split())[:300]
        raise Permanent(f"Ray does not start: {told} (is this machine busy? try again)") from error
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray 2.60 has no other way to bound the restarts of a pool's actors.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    DataContext.get_current().enable_progress_bars = False  # the table shows rows, not blocks
