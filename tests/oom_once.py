"""Trains with a worker that fills the memory until Ray's monitor kills it, and prints the error.

It is a separate process, because Ray reads the monitor's settings when it starts:
python oom_once.py FOLDER MODEL
"""

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import train_once

from zephyr_ray.errors import Permanent
from zephyr_ray.train import workers

MEBIBYTE = 2**20


def hog(config: dict[str, Any]) -> None:
    held = []
    while True:
        if psutil.virtual_memory().available > 1e9:
            held.append(bytearray(b"x") * (100 * MEBIBYTE))
        time.sleep(0.1)


def main(folder: Path, model: Path) -> None:
    """Lets the monitor kill a worker that uses more than 3 GB beyond the present memory use."""
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + 3e9) / memory.total
    workers.run_worker = hog
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"memory_usage_threshold": share, "memory_monitor_refresh_ms": 100},
    )
    try:
        train_once.sft(folder, model, zero=0)
    except Permanent as error:
        print(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
