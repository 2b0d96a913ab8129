"""The Ray cluster of this process: the one it was started for, else one on this machine."""

import logging
import os
import warnings
from typing import Any

OBJECT_STORE_BYTES = 512 * 1024**2
"""Of a cluster of our own; only rows of text go through it."""


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
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        # "local": else Ray joins whatever cluster it finds on this machine.
        quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ray.init("local", num_cpus=cpus, **quiet)
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray 2.60 has no other way to bound the restarts of a pool's actors.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    DataContext.get_current().enable_progress_bars = False  # the table shows rows, not blocks
