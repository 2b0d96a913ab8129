"""What a user can get wrong, found before any model is loaded: files, keys, memory, disk."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from zephyr_ray.errors import Permanent
from zephyr_ray.models import constraints
from zephyr_ray.models.openai import api_key
from zephyr_ray.models.vllm import KV_CACHE_BYTES
from zephyr_ray.models.weights import resolve
from zephyr_ray.plan import Step, digest, model_spec, stages_read, start_weights, weights_place
from zephyr_ray.ray_cluster import check_reachable
from zephyr_ray.recipe import Recipe
from zephyr_ray.settings import FILE, marked
from zephyr_ray.stage import Stage
from zephyr_ray.store import Store, numbered_jsonl

WORKER_BYTES = 1.5e9
"""Resident memory of one worker or engine before its model: torch and friends, measured."""
TEXT_BYTES = 100e6
"""Disk kept free for text and logs."""


def preflight(recipe: Recipe, store: Store, steps: list[Step]) -> None:
    """Everything a user can get wrong, checked before any model is loaded. Raises Permanent."""
    todo = [step for step in steps if step.artifact is None]
    if todo:
        check_reachable()
    if not os.environ.get("RAY_ADDRESS"):  # else the work runs on a cluster, not here
        check_room(recipe, [step.name for step in todo], os.cpu_count() or 1, None, "this machine")
    disk = TEXT_BYTES
    for step in todo:
        for what, ref in recipe.reads(step.stage):
            if what not in ("weights", "model", "judge"):
                continue
            spec = model_spec(recipe, ref)
            if spec.engine in ("openai", "service"):
                api_key(spec)
            for weights in filter(None, (spec.weights, spec.relevance)):
                if weights not in recipe.stages:
                    resolve(weights_place(recipe, weights))
            if spec.demonstrations:
                check_demonstrations(recipe.file(spec.demonstrations))
        folders = _start_weights(recipe, step.stage)
        parameters = max(map(count_parameters, folders), default=0)
        memory = _memory(recipe, step.stage, parameters)
        _check_memory(step.name, memory)
        if step.stage.makes == "weights":
            _check_targets(step.name, step.stage, folders[0])
            # fp32 weights, and two checkpoints of weights and two Adam moments while it trains.
            disk += 4 * parameters + TEXT_BYTES
            transient = 2 * 16 * parameters
            _check_disk(store, step.name, disk + transient)
    _check_disk(store, "the run", disk)


def check_files(recipe: Recipe, absolute: bool = True) -> None:
    """Seeds and other files of every stage, cached or not, and what it reads; without `absolute`,
    stages whose files have full paths are left out: those lie where the recipe will run."""
    for name, stage in recipe.stages.items():
        named = [Path(value) for _, _, values in marked(stage, FILE) for value in values]
        if not absolute and any(path.is_absolute() for path in named):
            continue
        files = {f: recipe.file(v) for f, _, values in marked(stage, FILE) for v in values}
        try:
            for path in files.values():
                digest(path)
            stage.check(files, {read: recipe.stages[read] for read in stages_read(recipe, stage)})
        except Permanent as error:
            raise Permanent(f"stage '{name}': {error}") from None


def check_demonstrations(path: Path) -> None:
    """Worked examples of a model: each with an instruction, an answer, perhaps a constraint."""
    for number, row in numbered_jsonl(path):
        for field in ("instruction", "answer"):
            if not isinstance(row.get(field), str):
                raise Permanent(f'{path} line {number}: needs an "{field}", a text')
        try:
            constraints.validate(row.get("constraint") or {})
        except Permanent as error:
            raise Permanent(f"{path} line {number}: {error}") from None


def _start_weights(recipe: Recipe, stage: Stage) -> list[Path]:
    """The folders behind the models that a stage trains or starts; a trained stage stands for the
    weights it was trained from."""
    return [
        resolve(weights_place(recipe, weights))
        for what, ref in recipe.reads(stage)
        if what in ("weights", "model", "judge") and (weights := start_weights(recipe, ref))
    ]


def _check_targets(name: str, stage: Stage, weights: Path) -> None:
    """Adapters go onto modules that the model has."""
    lora = getattr(stage, "lora", None)
    modules = {f".{tensor.rpartition('.')[0]}" for tensor in tensors(weights)}
    for target in (lora and lora.targets) or []:
        if not any(module.endswith(f".{target}") for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules})
            raise Permanent(
                f"stage '{name}': lora.targets: the model has no module '{target}'; it has "
                + ", ".join(known)
            )


def count_parameters(folder: Path) -> int:
    return sum(math.prod(shape) for shape in tensors(folder).values())


def tensors(folder: Path) -> dict[str, list[int]]:
    """Shapes by name, from the headers of the safetensors files; no weight is read."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            try:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                shapes |= {n: t["shape"] for n, t in header.items() if n != "__metadata__"}
            except (ValueError, OverflowError, MemoryError, AttributeError, TypeError, KeyError):
                raise Permanent(f"{path}: not a safetensors file, or cut short") from None
    return shapes


def _memory(recipe: Recipe, stage: Stage, parameters: int) -> float:
    """Bytes of this machine's memory the stage needs, roughly; 0 for work on GPUs."""
    settings = stage.model_dump()
    if stage.makes == "weights":
        workers = settings["workers"]
        if settings["gpus_per_worker"]:
            return 0.0
        # fp32 weights and gradients on every worker (ZeRO-3 shares them), two Adam moments in all.
        copies = 1 if settings["zero"] == 3 else workers
        reference = 4 * parameters * copies if stage.kind == "dpo" else 0
        return (8 * copies + 8) * parameters + reference + workers * WORKER_BYTES
    most = 0.0
    for what, ref in recipe.reads(stage):
        if what in ("model", "judge"):
            spec = model_spec(recipe, ref)
            if spec.engine == "vllm" and not spec.gpus:
                one = 2 * parameters + KV_CACHE_BYTES + WORKER_BYTES
                most = max(most, min(spec.actors, os.cpu_count() or 1) * one)
    return most


def _check_memory(name: str, needed: float) -> None:
    if os.environ.get("RAY_ADDRESS"):
        return  # the work runs on a cluster, not on this machine
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise Permanent(
            f"stage '{name}' needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
            "free; use fewer workers or actors, zero: 3, or a smaller model"
        )


def check_room(
    recipe: Recipe, names: Iterable[str], cpus: float, gpus: float | None, place: str
) -> None:
    """Permanent where a stage asks for more CPUs or GPUs at once than there are: Ray would wait for
    them for ever. `gpus` None: those of this machine."""
    for name in names:
        stage, wanted, threads = recipe.stages[name], 0.0, 0
        settings, lower = stage.model_dump(), "the gpus of its models"
        for what, ref in recipe.reads(stage):
            if what in ("model", "judge"):
                wanted = max(wanted, model_spec(recipe, ref).gpus)
        if "gpus_per_worker" in settings:
            workers, lower = settings["workers"], f"{name}.workers"
            wanted = workers * settings["gpus_per_worker"]
            threads = workers * settings["cpus_per_worker"]
        if wanted and gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        if wanted > (gpus or 0):
            raise Permanent(
                f"stage '{name}' wants {wanted:g} GPUs, {place} has {gpus:g}: lower {lower}, or "
                "add GPUs"
            )
        if threads > cpus:
            raise Permanent(
                f"stage '{name}' wants {threads} CPUs, {place} has {cpus:g}: lower {lower} or "
                f"{name}.cpus_per_worker, or add CPUs"
            )


def _check_disk(store: Store, name: str, needed: float) -> None:
    free = shutil.disk_usage(store.storage).free
    if needed > free:
        raise Permanent(
            f"{name} needs about {needed / 1e9:.1f} GB of disk below {store.storage}, "
            f"{free / 1e9:.1f} GB are free; free some, or choose another with --set storage=FOLDER"
        )
