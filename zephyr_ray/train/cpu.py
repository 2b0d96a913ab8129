"""Configures a worker's process so that DeepSpeed runs, and runs fast, without a GPU."""

import ctypes
import importlib
import os
from typing import Any

CPU_TILE = 1024, 4096
"""Maximum tokens and vocabulary entries per tile of logits in the output layer. TRL's tiles of
4,096 × 32,768 are for a GPU: on a CPU, their intermediate results take 4 GB, and save no time."""


def prepare_worker(threads: int) -> None:
    """Prepares this process to run a model, before it imports Hugging Face's libraries."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
        # Without this, accelerate would override the thread count.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        keep_freed_memory()
        let_deepspeed_run_on_cpu()
        use_small_tiles()


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for reuse.

    By default glibc returns large tensors to the system and faults them in again at every step,
    which takes a third of the CPU time of a forward and backward pass (measured with 135M
    parameters and 340 tokens).
    """
    mmap_max, trim_threshold = -4, -1  # from malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def let_deepspeed_run_on_cpu() -> None:
    """Makes Hugging Face's libraries use DeepSpeed without an accelerator.

    By default they ignore DeepSpeed on a machine without an accelerator. Patches private names of
    the pinned versions; `reporter.refuse_other_engines` fails if DeepSpeed is still ignored.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import trl.trainer.utils
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    prepare_backend = PartialState._prepare_backend

    def with_gloo(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = prepare_backend(self, *args, **kwargs)
        return (backend, kind) if backend else ("gloo", DistributedType.MULTI_CPU)

    PartialState._prepare_backend = with_gloo
    # Skip building a shared-memory collective that only inference uses; compiling it with g++ takes
    # a minute.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.build_shm_op = lambda: None
    # TRL skips untrained positions in the output layer only if it believes that Triton runs here.
    trl.trainer.utils._use_triton = lambda device: True


def use_small_tiles() -> None:
    """Makes TRL compute the output layer in tiles of CPU_TILE. Patches names of the pinned
    TRL; `tests/test_planner_constants.py` fails if they move."""
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    tokens, vocabulary = CPU_TILE
    trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE = tokens
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = vocabulary
