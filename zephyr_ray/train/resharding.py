"""Rewrites a checkpoint of DeepSpeed for another number of workers.

ZeRO splits the optimizer state: stages 1 and 2 keep each group of parameters as one flat tensor and
split that, stage 3 splits every parameter by itself. Each new worker cuts its part out of the files
of the old workers, which are mapped into memory: it holds only its own part. DeepSpeed's universal
checkpoints serve the same purpose, but every worker would read the complete state, and stage 3
would give all parameters the weight decay of the first group.

Imports PyTorch: import this module only in a worker.
"""

import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zephyr_ray.store import write_atomically
from zephyr_ray.train.checkpoints import state_folder, written_by

SUB_GROUP = 1_000_000_000
"""Elements per worker at which ZeRO-3 ends a group of parameters that it updates at once
(DeepSpeed's sub_group_size)."""
ALIGNMENT = 2
"""The length of a flat group is a multiple of this many elements per worker (DeepSpeed's
nccl_start_alignment_factor)."""
State = dict[Any, Any]
Shapes = dict[str, torch.Size]
"""Shapes of parameters by name, in the order of their elements in a flat tensor."""


@dataclass(frozen=True)
class Split:
    """Elements that ZeRO splits evenly over workers: a flat group, or one parameter."""

    group: int
    """Index of the old flat tensors that hold the elements."""
    offset: int
    """Index of the first element in them."""
    size: int
    """Elements, over all workers."""
    old: int
    """Elements per old worker, including padding at the end."""
    new: int
    """Elements per new worker, including padding at the end."""

    def part(self, flats: list[Tensor], rank: int) -> Tensor:
        """Returns the elements of a new worker, cut from the flat tensors of all old workers."""
        start = rank * self.new
        part = torch.zeros(self.new, dtype=flats[0].dtype)
        for number, flat in enumerate(flats):
            first = number * self.old
            low, high = max(start, first), min(start + self.new, first + self.old, self.size)
            if low < high:
                source = flat[self.offset + low - first : self.offset + high - first]
                part[low - start : high - start] = source
        return part


def fit_to_workers(checkpoint: Path, rank: int, workers: int, barrier: Callable[[], None]) -> None:
    """Rewrites the checkpoint if another number of workers wrote it. Every worker calls this.

    A kill at any time leaves the old state or the new one valid: `latest` names it.
    """
    old, (zero, writers) = state_folder(checkpoint), written_by(checkpoint)
    barrier()  # no worker changes the folder before all have read it
    if rank == 0:
        _add_random_states(checkpoint, workers)
        for leftover in checkpoint.glob("global_step*"):
            if leftover != old:
                shutil.rmtree(leftover)
    if zero and writers != workers:
        new = checkpoint / f"{old.name.partition('-')[0]}-{workers}"
        barrier()
        new.mkdir(exist_ok=True)
        rewrite(old, new, rank, workers)
        barrier()
        if rank == 0:
            write_atomically(checkpoint / "latest", new.name)
            shutil.rmtree(old)
    barrier()


def rewrite(old: Path, new: Path, rank: int, workers: int) -> None:
    """Writes the state of one of the new workers."""
    part = "zero_pp_rank_{}_mp_rank_00_{}_states.pt"
    optimizers = _load_all(old, part, "optim")
    states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
    if models := _load_all(old, part, "model"):
        state, shapes = _parameters(states, models[0]["param_shapes"], rank, workers)
        # The shapes lack frozen parameters: transformers leaves them out if it trains adapters.
        model = models[0] | {"param_shapes": shapes, "dp_world_size": workers}
        _save(model, new / part.format(rank, "model"))
    else:
        state, name = _flat_groups(states, rank, workers), "mp_rank_00_model_states.pt"
        if rank == 0:
            _save(_load(old / name) | {"dp_world_size": workers}, new / name)
    _save(optimizers[0] | {"optimizer_state_dict": state}, new / part.format(rank, "optim"))


def _flat_groups(states: list[State], rank: int, workers: int) -> State:
    """Returns a worker's optimizer state of ZeRO stage 1 or 2, whose fp32 weights are stored
    without padding."""
    weights = [state["single_partition_of_fp32_groups"] for state in states]
    splits = []
    for group, padding in enumerate(states[0]["group_paddings"]):
        size = sum(len(flats[group]) for flats in weights)
        old, new = len(weights[0][group]) + padding, math.ceil(size / workers / ALIGNMENT)
        splits.append(Split(group, offset=0, size=size, old=old, new=ALIGNMENT * new))
    groups = [[split] for split in splits]
    paddings = [min(max((rank + 1) * split.new - split.size, 0), split.new) for split in splits]
    parts = [
        part[: len(part) - padding].clone()
        for part, padding in zip(_flat(weights, groups, rank), paddings, strict=True)
    ]
    base = [state["base_optimizer_state"] for state in states]
    state = states[0] | {
        "base_optimizer_state": _adam(base, groups, [[n] for n in range(len(groups))], rank),
        "single_partition_of_fp32_groups": parts,
        "group_paddings": paddings,
        "partition_count": [workers] * len(groups),
    }
    state.pop("param_slice_mappings", None)  # describes the old parts; only converters read it
    return state


def _parameters(
    states: list[State], shapes: list[Shapes], rank: int, workers: int
) -> tuple[State, list[Shapes]]:
    """Returns a worker's optimizer state of ZeRO stage 3, and its parameters' shapes by sub-group.

    Stage 3 divides each group of the optimizer into sub-groups, each with its own flat tensors.
    """
    splits = {}
    for group, sub_group in enumerate(shapes):
        offset = 0
        for name, shape in sub_group.items():
            size = shape.numel()
            old, new = math.ceil(size / len(states)), math.ceil(size / workers)
            splits[name] = Split(group, offset, size, old, new)
            offset += old
    base = [state["optimizer_state_dict"] for state in states]
    sub_groups: list[list[str]] = []
    numbers: list[list[int]] = []
    for group in base[0]["param_groups"]:
        first = len(sub_groups)
        sub_groups += _sub_groups([n for g in group["params"] for n in shapes[g]], splits)
        numbers.append([*range(first, len(sub_groups))])
    groups = [[splits[name] for name in names] for names in sub_groups]
    state = states[0] | {
        "optimizer_state_dict": _adam(base, groups, numbers, rank),
        "fp32_flat_groups": _flat([state["fp32_flat_groups"] for state in states], groups, rank),
        "partition_count": workers,
    }
    shape_of = {name: shape for sub_group in shapes for name, shape in sub_group.items()}
    return state, [OrderedDict((name, shape_of[name]) for name in names) for names in sub_groups]


def _sub_groups(names: list[str], splits: dict[str, Split]) -> Iterator[list[str]]:
    """Yields the sub-groups of one group of the optimizer: each ends with the parameter that
    reaches the limit."""
    sub_group: list[str] = []
    elements = 0
    for name in names:
        sub_group.append(name)
        elements += splits[name].new
        if elements >= SUB_GROUP or name == names[-1]:
            yield sub_group
            sub_group, elements = [], 0


def _flat(old: list[list[Tensor]], groups: list[list[Split]], rank: int) -> list[Tensor]:
    """Returns a worker's flat tensors; `old` holds those of every old worker."""
    return [
        torch.cat([split.part([flats[split.group] for flats in old], rank) for split in group])
        for group in groups
    ]


def _adam(
    old: list[State], groups: list[list[Split]], numbers: list[list[int]], rank: int
) -> State:
    """Returns the state of PyTorch's optimizer for the flat tensors of one worker: moments are
    split like the weights; the step count is the same on all workers.

    `numbers`: indices of the flat tensors in each group of the optimizer.
    """
    state: State = {}
    for number, group in enumerate(groups):
        state[number] = dict(old[0]["state"][group[0].group])
        for name, value in state[number].items():
            if isinstance(value, Tensor) and value.dim():
                flats = [[entry[name] for entry in part["state"].values()] for part in old]
                [state[number][name]] = _flat(flats, [group], rank)
    param_groups = [
        group | {"params": params}
        for group, params in zip(old[0]["param_groups"], numbers, strict=True)
    ]
    return {"state": state, "param_groups": param_groups}


def _add_random_states(checkpoint: Path, workers: int) -> None:
    """Gives new workers the state of the random generators of old ones."""
    states = sorted(checkpoint.glob("rng_state*.pth"))
    names = [f"rng_state_{n}.pth" for n in range(workers)] if workers > 1 else ["rng_state.pth"]
    for number, name in enumerate(names):
        if not (checkpoint / name).exists():
            part = checkpoint / f".{name}"
            shutil.copyfile(states[number % len(states)], part)
            part.replace(checkpoint / name)


def _load_all(folder: Path, name: str, what: str) -> list[State]:
    """Returns the files of all workers by rank."""
    count = len(list(folder.glob(name.format("*", what))))
    return [_load(folder / name.format(rank, what)) for rank in range(count)]


def _load(path: Path) -> State:
    """Maps the tensors of a file into memory."""
    state: State = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return state


def _save(state: State, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
