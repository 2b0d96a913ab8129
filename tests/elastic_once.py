"""Trains on one or two workers, each on its own node, and kills the second node during training.
test_resharding.py runs this as a program."""

import os
import sys
import threading
import time
from pathlib import Path

import train_once

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

    threading.Thread(target=lose_second_node, daemon=True).start()
    settings = {"workers": {"least": 1, "most": 2}, "zero": 3, "epochs": int(sys.argv[3])}
    train_once.sft(folder, Path(sys.argv[2]), **settings)
    ray.shutdown()
    nodes.shutdown()
