"""Defines what a stage demands: calls and tokens of models, CPUs and GPUs, memory and disk."""

from collections.abc import Callable
from dataclasses import dataclass

_FEWER_ACTORS = "lower the actors of its models, or use a smaller model"


@dataclass(frozen=True)
class Calls:
    """Upper bounds on the requests to one model: calls, and tokens of prompts and of answers."""

    calls: float
    tokens_in: float
    tokens_out: float


@dataclass(frozen=True)
class Processors:
    """CPUs and GPUs that a stage occupies at once. Ray would wait forever for missing ones."""

    cpus: float = 0
    gpus: float = 0
    lower: str = "the gpus of its models"
    """Settings to lower if there are too few, as an error line names them."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a stage needs."""

    memory: float = 0
    """Peak host memory on the machine that runs it."""
    artifact: float = 0
    """Storage for its artifact."""
    scratch: float = 0
    """Storage beside the artifact while it runs."""
    fix: Callable[[float], str] = lambda free: _FEWER_ACTORS
    """Returns the fix in the error line if only `free` bytes of host memory are left for it."""


GIB = 2**30
GPU_RESERVE = 2 * GIB
"""Bytes per GPU for CUDA's context, NCCL, kernel workspaces and allocator fragmentation; a guess,
not measured."""
PROCESS_BYTES = 1.5e9
"""Resident bytes of one worker or engine process before it loads its model, mainly torch;
measured."""
RAY_BYTES = 1.5e9
"""Resident bytes of Ray's own processes and those that control a training stage; measured."""
