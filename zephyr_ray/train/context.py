"""Connects a training loop to the program that started it: reports and finds checkpoints.

Rank, world size and barriers are those of torch.distributed, whose process group exists before the
loop starts.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zephyr_ray.store import write_atomically
from zephyr_ray.train.checkpoints import RECORD, remove_checkpoints


class Context(Protocol):
    """Interface between a training loop and the program that started it."""

    def report(self, step: int, checkpoint: Path | None) -> None:
        """Reports that this worker finished the step and wrote its part of any checkpoint.

        Returns when all workers have reported.
        """

    def last_checkpoint(self) -> Path | None:
        """Returns the last checkpoint that all workers reported."""


class RayContext:
    """A worker of Ray Train."""

    def report(self, step: int, checkpoint: Path | None) -> None:
        import ray.train
        import torch.distributed
        from ray.train import Checkpoint, CheckpointUploadMode

        first = checkpoint and torch.distributed.get_rank() == 0
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(checkpoint) if first else None,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def last_checkpoint(self) -> Path | None:
        import ray.train

        reported = ray.train.get_checkpoint()
        return Path(reported.path) if reported else None


@dataclass(frozen=True)
class ProcessContext:
    """A process without Ray: alone, or one of several that torchrun started."""

    checkpoints: Path

    def __post_init__(self) -> None:
        """Joins the process group in torchrun's environment variables, else creates its own."""
        import torch

        if "RANK" not in os.environ:
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not torch.distributed.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend)

    def report(self, step: int, checkpoint: Path | None) -> None:
        import torch.distributed

        torch.distributed.barrier()
        if checkpoint and torch.distributed.get_rank() == 0:
            write_atomically(self.checkpoints / RECORD, checkpoint.name)
            remove_checkpoints(self.checkpoints, keep=checkpoint.name)

    def last_checkpoint(self) -> Path | None:
        record = self.checkpoints / RECORD
        return self.checkpoints / record.read_text(encoding="utf-8") if record.exists() else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
