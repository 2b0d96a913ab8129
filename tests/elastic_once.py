"""Trains on one or two workers, each on its own node, and kills the second node during training.
test_resharding.py runs this as a program."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import train_once

from zephyr_ray.train import worker, workers
from zephyr_ray.train.context import RayContext

HELD = 10
"""Step after which two workers wait for the loss of a node; it has a checkpoint."""


def run_held(config: dict[str, Any]) -> None:
    """Runs a worker of two until step HELD; then waits until its node, or the other's, is lost."""
    lost, report = config["job"].scratch / "lost", RayContext.report

    def report_and_wait(context: RayContext, step: int, checkpoint: Path | None) -> None:
        report(context, step, checkpoint)
        while step == HELD and not lost.exists():
            time.sleep(0.1)

    RayContext.report = report_and_wait  # type: ignore[method-assign]
    worker.run_worker(config)


if __name__ == "__main__":
    os.environ |= {"RAY_AUTH_MODE": "disabled"}
    # Ray detects the lost node within a second, and waits for it only for 20.
    os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}
    os.environ |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(sys.argv[1])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    ray.init(nodes.address, log_to_driver=False, logging_level="error")

    def lose_second_node() -> None:
        snapshot = folder / "made" / "scratch" / "checkpoints" / "checkpoint_manager_snapshot.json"
        while not snapshot.exists() or "checkpoint-" not in snapshot.read_text():
            time.sleep(0.02)
        nodes.remove_node(second, allow_graceful=False)
        (folder / "made" / "scratch" / "lost").touch()

    workers.run_worker = run_held
    threading.Thread(target=lose_second_node, daemon=True).start()
    settings = {"workers": {"least": 1, "most": 2}, "zero": 3, "epochs": int(sys.argv[3])}
    train_once.sft(folder, Path(sys.argv[2]), **settings)
    ray.shutdown()
    nodes.shutdown()
