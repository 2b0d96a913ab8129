"""What a training stage will need: memory, steps, tokens, hours, and what would make it fit."""

import math
from dataclasses import dataclass
from typing import Any

from zephyr_ray.demand import GIB
from zephyr_ray.models.shapes import Shape
from zephyr_ray.recipe import Hardware
from zephyr_ray.train import memory
from zephyr_ray.train.settings import TrainingSettings


@dataclass(frozen=True)
class Training:
    """The estimate of one stage. `fits` is None where no GPU's memory is stated."""

    parameters: int
    trained: int
    memory: memory.Memory
    micro: int
    most: int | None
    """The most rows of one forward pass that fit; None where none does or nothing is stated."""
    fits: bool | None
    advice: str
    sequences: int | None
    """Rows of one epoch: packed sequences, or pairs."""
    steps: int | None
    tokens: float | None
    """Of the whole stage."""
    bound: bool
    """Whether sequences, steps and tokens are a bound from above, not an expectation."""
    hours: float | None


def estimate(
    stage: TrainingSettings,
    shape: Shape,
    hardware: Hardware | None,
    rows: int | None,
    row_tokens: float | None,
    rate: float | None,
) -> Training:
    """`rows` are what the stage reads, of `row_tokens` tokens each where that is known; `rate` is
    the measured or stated number of sequences or pairs a second, all workers together."""
    micro = stage.batches()[0]
    room = hardware.gpu_memory_gib * GIB if hardware and stage.gpus_per_worker else None
    found = memory.training(stage, shape)
    # dpo's reference scores before training, and takes less.
    fits = None if room is None else found.total <= room
    sequences, bound = _sequences(stage, rows, row_tokens)
    steps = sequences and max(1, math.ceil(stage.epochs * sequences / stage.global_batch))
    length: float = stage.max_length * stage.sequences_per_row
    if row_tokens and rows and sequences and not getattr(stage, "packing", False):
        length = min(length, row_tokens)
    tokens = sequences * stage.epochs * length if sequences else None
    hours = None
    if rate and sequences:
        hours = sequences * stage.epochs / rate / 3600
    elif hardware and hardware.tflops and tokens and stage.gpus_per_worker:
        # A token costs 6 operations a parameter, 4 where most are frozen; dpo's reference 2, once.
        work = (4 if stage.lora else 6) * tokens + (2 * tokens / stage.epochs) * (
            stage.sequences_per_row - 1
        )
        speed = stage.workers * hardware.tflops * 1e12
        hours = work * shape.parameters / speed / 3600
    return Training(
        parameters=shape.parameters,
        trained=memory.trained(stage, shape),
        memory=found,
        micro=micro,
        most=_most(stage, shape, room) if room else None,
        fits=fits,
        advice=_advice(stage, shape, room) if room and not fits else "",
        sequences=sequences,
        steps=steps,
        tokens=tokens,
        bound=bound,
        hours=hours,
    )


def _sequences(
    stage: TrainingSettings, rows: int | None, row_tokens: float | None
) -> tuple[int | None, bool]:
    """(rows of one epoch after packing, whether they are a bound)."""
    if rows is None:
        return None, False
    if not getattr(stage, "packing", False):
        return rows, row_tokens is None
    if row_tokens is None:
        return rows, True
    return min(rows, math.ceil(rows * row_tokens / stage.max_length)), False


def _needs(stage: TrainingSettings, shape: Shape) -> float:
    return memory.training(stage, shape).total


def _most(stage: TrainingSettings, shape: Shape, room: float) -> int | None:
    share = stage.global_batch // stage.workers
    for micro in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        if _needs(stage.model_copy(update={"micro_batch": micro}), shape) <= room:
            return micro
    return None


def _advice(stage: TrainingSettings, shape: Shape, room: float) -> str:
    """The first change that makes the stage fit: one setting, else several."""
    changes: list[dict[str, Any]] = [
        {"gradient_checkpointing": True},
        *({"micro_batch": n} for n in _smaller(stage.batches()[0])),
        *({"zero": zero} for zero in (2, 3) if zero > stage.zero and not _quantized(stage, zero)),
        {"zero": max(stage.zero, 2), "offload": "optimizer"},
        {"zero": 3, "offload": "all"},
        *({"workers": n} for n in _larger(stage)),
    ]
    changes = [
        {name: value for name, value in change.items() if getattr(stage, name) != value}
        for change in changes
        if not (change.get("zero") == 3 and _quantized(stage, 3))
    ]
    for change in changes:
        if _needs(stage.model_copy(update=change), shape) <= room:
            return f"{_said(change)} makes it fit"
    together: dict[str, Any] = {}
    least = [{"micro_batch": 1} if "micro_batch" in change else change for change in changes]
    for change in least:
        together |= change
        if _needs(stage.model_copy(update=together), shape) <= room:
            return f"{_said(together)} together make it fit"
    lora = "" if stage.lora else "LoRA (lora: {}) or "
    return f"no setting makes it fit; a GPU with more memory, {lora}a smaller model"


def _quantized(stage: TrainingSettings, zero: int) -> bool:
    return zero == 3 and stage.lora is not None and stage.lora.quantized


def _smaller(micro: int) -> list[int]:
    return [n for n in range(micro - 1, 0, -1) if micro % n == 0]


def _larger(stage: TrainingSettings) -> list[int]:
    known = (2**n * stage.workers for n in range(1, 6))
    return [workers for workers in known if stage.global_batch % workers == 0]


def _said(change: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {str(value).lower()}" for name, value in change.items())
