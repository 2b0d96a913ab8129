"""The Ray cluster of this process: the one it was started for, else one on this machine."""

import os
from typing import Any

OBJECT_STORE_BYTES = 512 * 1024**2
"""Of a cluster of our own; only rows of text go through it."""


def connect() -> None:
    """Joins or starts the cluster, once. A cluster of our own ends with this process."""
    import ray
    from ray.data import DataContext

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    DataContext.get_current().enable_progress_bars = False  # the table shows rows, not blocks
