"""Loads a recipe: named models and an ordered list of stages, checked before any work."""

import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from zephyr_ray.engines import DEFAULT, ENGINES
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.recipe_file import mapping, read
from zephyr_ray.references import References
from zephyr_ray.settings import FILE, Reads, Strict, marked, typed
from zephyr_ray.stage import Stage, Variant, original_name
from zephyr_ray.sweep import Unexpanded, expand

SEED_LIMIT = 2**32
"""Exclusive upper bound of seeds: NumPy rejects larger ones, but only when training starts."""
RECIPE_SETTINGS = {
    *("name", "storage", "seed", "hardware", "models", "stages", "sweep", "budget_usd"),
}
"""Top-level settings of a recipe."""
RESERVED_FOLDERS = ("store", "mlartifacts", "answers", "spending")
"""Subfolders of the storage folder that no recipe may use as its name."""


class Hardware(Strict):
    """Hardware that the plan assumes; it does not affect any stage."""

    gpu_memory_gib: float = Field(gt=0)
    """Memory per GPU in GiB."""
    tflops: float | None = Field(None, gt=0)
    """Sustained training throughput per GPU in TFLOP/s, not its peak."""
    rows_per_second: dict[str, float] = {}
    """Measured throughput by stage: rows, sequences or pairs per second, summed over the stage's
    workers. For a swept stage, the rate applies to each copy."""


@dataclass(frozen=True)
class Recipe:
    """A complete, checked recipe."""

    name: str
    storage: Path
    folders: list[Path]
    """Folders to look for files in: the recipe's, then that of the recipe it extends."""
    seed: int
    models: dict[str, RecipeModel]
    """Models by the name that stages use: those of the recipe, then stages that train one."""
    stages: dict[str, Stage]
    hardware: Hardware | None = None
    variants: dict[str, Variant] = field(default_factory=dict)
    """The stages and models that the sweep copied, by the name of the copy."""
    budget_usd: float | None = None
    """Maximum dollars that all runs of the recipe together may spend on models with a price."""

    def file(self, value: str) -> Path:
        """Returns the path of a file or folder that a setting names."""
        return locate(self.folders, value)

    def files(self, stage: Stage) -> dict[str, Path]:
        """Returns the files of a stage by the setting that names them."""
        return {f: self.file(v) for f, _, values in marked(stage, FILE) for v in values}

    def environment_variables(self) -> dict[str, str]:
        """Returns the environment variables that models read, each mapped to the name of one model
        that reads it."""
        return {
            v: name
            for name, model in self.models.items()
            for v in model.settings.environment_variables()
        }

    def models_read(self, stage: Stage) -> dict[str, RecipeModel]:
        """Returns the models that a stage uses (to train, to generate answers or to judge), by
        name."""
        return {
            ref: self.models[ref]
            for _, mark, refs in marked(stage, Reads)
            for ref in refs
            if mark.is_model
        }

    def stages_read(self, stage: Stage) -> list[str]:
        """Returns the stages whose artifacts a stage needs, directly or as a model's weights."""
        names: list[str] = []
        for _, mark, refs in marked(stage, Reads):
            for ref in refs:
                names += self.models[ref].stages if mark.is_model else [ref]
        return list(dict.fromkeys(names))

    def lineage(self, stage: Stage) -> list[str]:
        """Returns all stages that lead to this one, in the order of the recipe."""
        pending, seen = self.stages_read(stage), set[str]()
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += self.stages_read(self.stages[name])
        return [name for name in self.stages if name in seen]


def locate(folders: list[Path], value: str) -> Path:
    """Returns `value` as a path in the first folder that contains it, or in the first folder if
    none does; expands a leading ~."""
    value = os.path.expanduser(value)
    return next((f / value for f in folders if (f / value).exists()), folders[0] / value)


def load(path: Path, kinds: dict[str, type[Stage]], overrides: list[str] | None = None) -> Recipe:
    """Returns the recipe of a file. Raises Permanent with one line about the first error."""
    raw, folders = read(path, overrides or [])
    unknown = sorted(map(str, set(raw) - RECIPE_SETTINGS))
    if unknown:
        raise Permanent(
            f"{path}: unknown setting '{unknown[0]}'"
            + suggest(unknown[0], {"extends", *RECIPE_SETTINGS})
        )
    name, seed = raw.get("name", path.stem), raw.get("seed", 0)
    if not isinstance(name, str):
        raise Permanent(f"{path}: name is {name!r}, which is not text; quote it")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name in RESERVED_FOLDERS:
        raise Permanent(
            f"{path}: invalid name '{name}'; use lowercase letters, digits, '.', '_' and '-', "
            f"starting with a letter or digit, and none of {', '.join(RESERVED_FOLDERS)}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEED_LIMIT:
        raise Permanent(f"{path}: seed must be a whole number from 0 to 2^32 - 1, not {seed!r}")
    settings_of = {
        str(n): _model_settings(spec, f"{path}: model '{n}'")
        for n, spec in mapping(raw.get("models", {}), f"{path}: models").items()
    }
    raw_stages = {str(n): s for n, s in mapping(raw.get("stages"), f"{path}: stages").items()}
    if not raw_stages:
        raise Permanent(f"{path}: no stages; add some under stages:")
    defaults = {"seed": seed, "title": name}

    def make(stage: str, values: dict[str, Any]) -> Stage:
        where = f"{path}: stage '{stage}'"
        return _stage(stage, mapping(raw_stages[stage], where) | values, kinds, defaults, where)

    unexpanded = Unexpanded(f"{path}: sweep", list(raw_stages), settings_of, make)
    expanded = expand(unexpanded, raw.get("sweep", {}))
    hardware = raw.get("hardware")
    if hardware is not None:
        hardware = typed(Hardware, hardware, f"{path}: hardware")
        rates = hardware.rows_per_second
        if unknown := sorted(set(rates) - set(raw_stages)):
            raise Permanent(
                f"{path}: hardware: rows_per_second: no stage '{unknown[0]}'; correct the name"
            )
        originals = {name: original_name(name, expanded.variants) for name in expanded.stages}
        rates = {name: rates[stage] for name, stage in originals.items() if stage in rates}
        hardware = hardware.model_copy(update={"rows_per_second": rates})
    references = References(str(path), expanded.models, expanded.stages, partial(locate, folders))
    return Recipe(
        name=name,
        storage=_storage(raw.get("storage", "runs"), path),
        folders=folders,
        seed=seed,
        models=references.models(),
        stages=expanded.stages,
        hardware=hardware,
        variants=expanded.variants,
        budget_usd=_budget(raw.get("budget_usd"), path),
    )


def _budget(value: Any, path: Path) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (is_number and value >= 0):
        return value
    raise Permanent(f"{path}: budget_usd is {value!r}; it must be a number of dollars, 0 or more")


def _storage(value: Any, path: Path) -> Path:
    """Returns the storage folder that the recipe at `path` names. Raises Permanent if the value is
    not the path of a folder that all components can use."""
    if not isinstance(value, str) or not value or "://" in value:
        raise Permanent(
            f"{path}: storage is {value!r}; it must be a folder (on a cluster, one that every "
            "node mounts)"
        )
    folder = os.path.expanduser(value)
    unusable = {
        "names a user who does not exist": folder.startswith("~"),
        "contains a shell variable": "$" in folder,
        "contains characters that cannot be printed": not folder.isprintable(),
        "contains '::', which Hugging Face Datasets reads as a URL": "::" in folder,
    }
    for reason, applies in unusable.items():
        if applies:
            raise Permanent(f"{path}: storage {value!r} {reason}; write the path of a folder")
    return Path(folder)


def _model_settings(raw: Any, where: str) -> ModelSettings:
    raw = mapping(raw, where)
    if "engine" not in raw and (foreign := raw.keys() - ENGINES[DEFAULT].model_fields.keys()):
        engines = [name for name, e in ENGINES.items() if raw.keys() <= e.model_fields.keys()]
        if engines:
            raise Permanent(
                f"{where}: engine {DEFAULT}, the default, has no setting '{min(foreign)}'; set "
                f"engine: {' or '.join(engines)}"
            )
    name = str(raw.get("engine", DEFAULT))
    if (settings := ENGINES.get(name)) is None:
        raise Permanent(f"{where}: setting 'engine': unknown{suggest(name, ENGINES)}")
    return typed(settings, raw, where)


def _stage(
    name: str,
    settings: dict[str, Any],
    kinds: dict[str, type[Stage]],
    defaults: dict[str, Any],
    where: str,
) -> Stage:
    """Returns one stage; `defaults` apply to kinds that have such a setting."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise Permanent(
            f"{where}: invalid stage name; use letters, digits, '_' and '-', starting with a "
            "letter or digit"
        )
    settings = dict(settings)
    if "kind" not in settings:
        raise Permanent(f"{where}: setting 'kind' is missing; known: {', '.join(sorted(kinds))}")
    kind = str(settings.pop("kind"))
    if (stage_type := kinds.get(kind)) is None:
        raise Permanent(f"{where}: unknown kind '{kind}'{suggest(kind, kinds)}")
    for setting, value in defaults.items():
        if setting in stage_type.model_fields:
            settings.setdefault(setting, value)
    stage = typed(stage_type, settings, where)
    if not 0 <= getattr(stage, "seed", 0) < SEED_LIMIT:
        raise Permanent(f"{where}: setting 'seed' must be a whole number from 0 to 2^32 - 1")
    return stage
