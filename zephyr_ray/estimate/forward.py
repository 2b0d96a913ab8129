"""Estimates memory, tokens and hours of a stage that only runs forward passes on workers."""

from dataclasses import dataclass

from zephyr_ray.demand import GIB
from zephyr_ray.models.shapes import Shape
from zephyr_ray.recipe import Hardware
from zephyr_ray.train import memory
from zephyr_ray.train.settings import WorkerSettings


@dataclass(frozen=True)
class ForwardEstimate:
    """The estimate of one stage."""

    memory: memory.Memory
    """Bytes per worker."""
    fits: bool | None
    """Whether the stage fits in GPU memory; None if the GPU's memory is not stated."""
    advice: str
    """The change that makes it fit; empty if it fits or the GPU's memory is not stated."""
    tokens: float | None
    upper_bound: bool
    """Whether tokens are an upper bound instead of an expectation."""
    hours: float | None
    """Hours of wall time; None if unknown."""


def estimate(
    stage: WorkerSettings,
    shape: Shape,
    hardware: Hardware | None,
    rows: int | None,
    row_tokens: float | None,
    rate: float | None,
) -> ForwardEstimate:
    """Returns the estimate. `rows` is the number of rows that the stage reads, `row_tokens` the
    mean tokens per row if known, and `rate` the rows per second over all workers, measured or
    stated."""
    needed = memory.forward_memory(stage, shape)
    gib = hardware.gpu_memory_gib if hardware and stage.gpus_per_worker else None
    longest: float = stage.max_length * stage.sequences_per_row
    tokens = rows and rows * min(longest, row_tokens or longest)
    hours = None
    if rate and rows:
        hours = rows / rate / 3600
    elif hardware and hardware.tflops and tokens and stage.gpus_per_worker:
        # A forward pass costs 2 FLOPs per parameter and token.
        speed = stage.workers.least * hardware.tflops * 1e12
        hours = 2 * tokens * shape.parameters / speed / 3600
    fits = None if gib is None else needed.total <= gib * GIB
    advice = "" if gib is None or fits else _advise(stage, shape, gib * GIB)
    return ForwardEstimate(needed, fits, advice, tokens, row_tokens is None, hours)


def _advise(stage: WorkerSettings, shape: Shape, capacity: float) -> str:
    split = stage.model_copy(update={"zero": 3})
    fits = memory.forward_memory(split, shape).total <= capacity
    if fits and stage.zero != 3 and not stage.is_quantized():
        return "zero: 3 makes it fit"
    return stage.memory_savings()
