"""Estimates memory, steps, tokens and hours of a training stage, and what would make it fit."""

import math
from dataclasses import dataclass
from typing import Any

import psutil

from zephyr_ray.demand import GIB, RAY_BYTES
from zephyr_ray.models.shapes import Shape
from zephyr_ray.ray_cluster import cluster_address
from zephyr_ray.recipe import Hardware
from zephyr_ray.train import memory
from zephyr_ray.train.settings import TrainingSettings
from zephyr_ray.train.worker_count import WorkerCount


@dataclass(frozen=True)
class TrainingEstimate:
    """The estimate of one training stage."""

    trained: int
    """Parameters that have gradients."""
    memory: memory.Memory
    """Bytes per worker."""
    capacity: float | None
    """Bytes that a worker may use: of its GPU, or of this machine; None if unknown."""
    largest_micro_batch: int | None
    """Largest `micro_batch` that fits; None if none does or `capacity` is unknown."""
    fits: bool | None
    """Whether the stage fits; None if `capacity` is unknown."""
    advice: str
    """Change that makes the stage fit; empty if it fits or `capacity` is unknown."""
    sequences: int | None
    """Rows per epoch: packed sequences, or pairs."""
    steps: int | None
    """Optimizer steps over all epochs."""
    tokens: float | None
    """Tokens over all epochs."""
    upper_bound: bool
    """Whether sequences, steps and tokens are upper bounds instead of expectations."""
    hours: float | None
    """Hours of wall time with the fewest workers; None if unknown."""


def estimate(
    stage: TrainingSettings,
    shape: Shape,
    hardware: Hardware | None,
    rows: int | None,
    row_tokens: float | None,
    rate: float | None,
) -> TrainingEstimate:
    """Returns the estimate. `rows` is the number of rows that the stage reads, `row_tokens` the
    mean tokens per row if known, and `rate` the sequences or pairs per second over all workers,
    measured or stated."""
    capacity = _capacity(stage, hardware)
    largest = None if capacity is None else memory.largest_micro_batch(stage, shape, capacity)
    needed = memory.worker_memory(stage, shape)
    # DPO's reference pass runs before training and needs less memory.
    fits = None if capacity is None else needed.total <= capacity
    sequences, upper_bound = _sequences(stage, rows, row_tokens)
    steps = sequences and max(1, math.ceil(stage.epochs * sequences / stage.global_batch))
    length: float = stage.max_length * stage.sequences_per_row
    if row_tokens and rows and sequences and not stage.packs:
        length = min(length, row_tokens)
    tokens = sequences * stage.epochs * length if sequences else None
    hours = None
    if rate and sequences:
        hours = sequences * stage.epochs / rate / 3600
    elif hardware and hardware.tflops and tokens and stage.gpus_per_worker:
        # Training costs 6 FLOPs per parameter and token, 4 with LoRA.
        per_token = (4 if stage.lora else 6) + stage.reference_flops / stage.epochs
        operations = per_token * tokens
        speed = stage.workers.least * hardware.tflops * 1e12
        hours = operations * shape.parameters / speed / 3600
    return TrainingEstimate(
        trained=memory.trained_parameters(stage, shape),
        memory=needed,
        capacity=capacity,
        largest_micro_batch=largest,
        fits=fits,
        advice=_advise(stage, shape, capacity) if capacity and not fits else "",
        sequences=sequences,
        steps=steps,
        tokens=tokens,
        upper_bound=upper_bound,
        hours=hours,
    )


def validation(stage: TrainingSettings, steps: int, rows: int, held_out: int) -> tuple[int, float]:
    """Returns how often the held-out rows are evaluated, and what that costs as a share of
    training: a forward pass costs 2 FLOPs per parameter and token."""
    times = 1 + math.ceil(steps / stage.validate_every)
    per_token = 4 if stage.lora else 6
    return times, times * held_out * 2 / (stage.epochs * rows * per_token)


def _capacity(stage: TrainingSettings, hardware: Hardware | None) -> float | None:
    """Returns the bytes that a worker may use: of its GPU, if the recipe states them, or of this
    machine's free memory, unless a cluster runs the stage."""
    if stage.gpus_per_worker:
        return hardware.gpu_memory_gib * GIB if hardware else None
    if cluster_address() is not None:
        return None
    return max(0, psutil.virtual_memory().available - RAY_BYTES) / stage.workers.least


def _sequences(
    stage: TrainingSettings, rows: int | None, row_tokens: float | None
) -> tuple[int | None, bool]:
    """Returns (rows per epoch after packing, whether they or their tokens are an upper bound)."""
    if rows is None:
        return None, False
    if not stage.packs:
        return rows, row_tokens is None
    if row_tokens is None:
        return rows, True
    return min(rows, math.ceil(rows * row_tokens / stage.max_length)), False


def _fits(stage: TrainingSettings, change: dict[str, Any], shape: Shape, capacity: float) -> bool:
    changed = stage.model_copy(update=change)
    return memory.worker_memory(changed, shape).total <= capacity


def _advise(stage: TrainingSettings, shape: Shape, capacity: float) -> str:
    """Returns advice: the first single setting that makes the stage fit, else a combination."""
    largest = memory.largest_micro_batch(stage, shape, capacity)
    if not stage.gpus_per_worker:
        return stage.memory_savings(largest)
    changes: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        {"micro_batch": largest or stage.longest_row},
        *({"zero": zero} for zero in (2, 3) if zero > stage.zero and not _forbidden(stage, zero)),
        {"zero": max(stage.zero, 2), "offload": "optimizer"},
        {"zero": 3, "offload": "all"},
        *({"workers": count} for count in _larger_worker_counts(stage)),
    ]
    changes = [
        {name: value for name, value in change.items() if getattr(stage, name) != value}
        for change in changes
        if not _forbidden(stage, change.get("zero"))
    ]
    for change in changes:
        if _fits(stage, change, shape, capacity):
            return f"{_format(change)} makes it fit"
    combined: dict[str, Any] = {}
    for change in changes:
        combined |= change
        if _fits(stage, combined, shape, capacity):
            return f"{_format(combined)} together make it fit"
    lora = "" if stage.lora else " or set lora: {}"
    return f"no setting makes it fit; use a GPU with more memory{lora}"


def _forbidden(stage: TrainingSettings, zero: int | None) -> bool:
    """Returns whether ZeRO-3 would have to split 4-bit weights, which it cannot."""
    return zero == 3 and stage.lora is not None and stage.lora.quantized


def _larger_worker_counts(stage: TrainingSettings) -> list[WorkerCount]:
    doubled = (2**n * stage.workers.least for n in range(1, 6))
    return [
        WorkerCount(least=least, most=max(least, stage.workers.most))
        for least in doubled
        if least <= stage.global_batch
    ]


def _format(change: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {str(value).lower()}" for name, value in change.items())
