"""Finds user errors before any model is loaded: files, keys, CPUs and GPUs, memory, disk."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from zephyr_ray.demand import RAY_BYTES, Footprint
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import number
from zephyr_ray.plan import Step
from zephyr_ray.ray_cluster import check_cluster, cluster_address
from zephyr_ray.recipe import Recipe
from zephyr_ray.stage import Stage
from zephyr_ray.store import Store, digest

TEXT_BYTES = 100e6
"""Bytes of disk per stage for text and logs."""


def preflight(recipe: Recipe, store: Store, steps: list[Step]) -> None:
    """Raises Permanent if the user must change something before the remaining stages can run."""
    check_budget(recipe, steps)
    pending = [step for step in steps if step.must_run]
    on_cluster = cluster_address() is not None
    if pending:
        check_cluster()
    if not on_cluster:
        check_processors(
            recipe, [step.name for step in pending], os.cpu_count() or 1, None, "this machine"
        )
    disk = TEXT_BYTES
    checked = set[str]()
    for step in pending:
        models = recipe.models_read(step.stage)
        for name, model in models.items():
            if name not in checked:
                model.check()
                checked.add(name)
        _check_settings(step, models)
        step.stage.preflight()
        footprint = step.stage.footprint(models)
        if not on_cluster:
            _check_memory(step.name, footprint)
        if footprint.artifact:
            # What an interrupted attempt holds is used or freed.
            held = _bytes_in(store.folder(step.stage.kind, step.key))
            disk += footprint.artifact + TEXT_BYTES - held
            _check_disk(store, step.name, disk + footprint.scratch)
    _check_disk(store, "the run", disk)


def check_settings(recipe: Recipe, steps: list[Step]) -> None:
    """Raises Permanent if the settings of a pending stage do not fit its models, or if the recipe
    has a budget and a pending stage uses a metered model without a price."""
    check_budget(recipe, steps)
    for step in steps:
        if step.must_run:
            models = recipe.models_read(step.stage)
            for model in models.values():
                model.check_files()
            _check_settings(step, models)


def check_budget(recipe: Recipe, steps: list[Step]) -> None:
    """Raises Permanent if the recipe has a budget and a pending metered model has no price."""
    if recipe.budget_usd is None:
        return
    pending = [step.stage for step in steps if step.must_run]
    for name, model in (m for stage in pending for m in recipe.models_read(stage).items()):
        tariff = model.settings.tariff()
        if model.settings.metered and (tariff is None or tariff.price is None):
            raise Permanent(
                f"model '{name}' has no price, so budget_usd cannot be enforced; set "
                f"models.{name}.price to its dollars per million tokens, as [input, output]"
            )


def _check_settings(step: Step, models: dict[str, RecipeModel]) -> None:
    """Raises Permanent if a stage's settings do not fit its models. For a model that is not on
    this machine, checks only its config."""
    try:
        _check_answers_fit(step.stage, models)
        step.stage.check_models(models)
    except Permanent as error:
        raise Permanent(f"stage '{step.name}': {error}") from None


def check_files(recipe: Recipe, absolute: bool = True) -> None:
    """Checks the files of every stage, cached or not, and the stages that it reads. If not
    `absolute`, skips stages with files at absolute paths, because those are on the cluster."""
    for name, stage in recipe.stages.items():
        files = recipe.files(stage)
        if not absolute and any(Path(getattr(stage, field)).is_absolute() for field in files):
            continue
        try:
            for path in files.values():
                digest(path)
            stage.check(files, {read: recipe.stages[read] for read in recipe.stages_read(stage)})
        except Permanent as error:
            raise Permanent(f"stage '{name}': {error}") from None


def check_processors(
    recipe: Recipe, names: Iterable[str], cpus: float, gpus: float | None, machine: str
) -> None:
    """Raises Permanent if a stage needs more CPUs or GPUs at once than `machine` has; Ray would
    wait forever. If `gpus` is None, counts the GPUs of this machine."""
    for name in names:
        stage = recipe.stages[name]
        needed = stage.processors(recipe.models_read(stage))
        if needed.gpus and gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        if needed.gpus > (gpus or 0):
            raise Permanent(
                f"stage '{name}' needs {needed.gpus:g} GPUs, {machine} has {gpus:g}; lower "
                f"{needed.lower} or add GPUs"
            )
        if needed.cpus > cpus:
            raise Permanent(
                f"stage '{name}' needs {needed.cpus:g} CPUs, {machine} has {cpus:g}; lower "
                f"{needed.lower} or cpus_per_worker, or add CPUs"
            )


def _check_answers_fit(stage: Stage, models: dict[str, RecipeModel]) -> None:
    tokens = stage.answer_tokens()
    for model in models.values():
        limit = model.limit()
        if limit is not None and tokens >= limit:
            raise Permanent(
                f"answers of up to {tokens} tokens leave no room for a prompt in the context of "
                f"model '{model.name}', {limit} tokens; lower max_tokens or use a model "
                "with a longer context"
            )


def _check_memory(name: str, footprint: Footprint) -> None:
    import psutil

    needed, free = footprint.memory + RAY_BYTES, psutil.virtual_memory().available
    if footprint.memory and needed > free:
        raise Permanent(
            f"stage '{name}' needs about {number(needed / 1e9, 1)} GB of memory, "
            f"{number(free / 1e9, 1)} GB are free; {footprint.fix(free - RAY_BYTES)}"
        )


def _bytes_in(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        # A worker of a killed run may still remove a checkpoint.
        with suppress(FileNotFoundError):
            size += 0 if path.is_dir() else path.lstat().st_size
    return size


def _check_disk(store: Store, name: str, needed: float) -> None:
    free = shutil.disk_usage(store.storage).free
    if needed > free:
        raise Permanent(
            f"{name} needs about {number(needed / 1e9, 1)} GB of disk below {store.storage}, "
            f"{number(free / 1e9, 1)} GB are free; free some, or use another "
            "folder with --set storage=FOLDER"
        )
