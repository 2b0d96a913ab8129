"""The recipe file: named models and an ordered list of stages, checked before any work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from zephyr_ray.engines.base import ModelSpec
from zephyr_ray.errors import Permanent
from zephyr_ray.recipe_file import mapping, read
from zephyr_ray.settings import Reads, Strict, marked, near, typed
from zephyr_ray.stage import Stage

SEEDS = 2**32
"""NumPy takes no other seeds, and would say so only hours later."""


TOP = {"name", "storage", "seed", "hardware", "models", "stages"}
"""The settings of a recipe itself."""


class Hardware(Strict):
    """What the plan reckons with; no stage reads it."""

    gpu_memory_gib: float = Field(gt=0)
    """Of one GPU."""
    tflops: float | None = Field(None, gt=0)
    """What one GPU keeps up in training, in 10^12 operations a second; not what its maker says."""
    rows_per_second: dict[str, float] = {}
    """By stage, where it is known better: sequences, pairs or rows, all its workers together."""


@dataclass(frozen=True)
class Recipe:
    """A whole, checked recipe. FILE settings lie in the first of `folders` that has them."""

    name: str
    storage: Path
    folders: list[Path]
    seed: int
    models: dict[str, ModelSpec]
    stages: dict[str, Stage]
    hardware: Hardware | None = None

    def file(self, value: str) -> Path:
        found = [folder / value for folder in self.folders if (folder / value).exists()]
        return found[0] if found else self.folders[0] / value

    def reads(self, stage: Stage) -> list[tuple[str, str]]:
        """What a stage reads, as (artifact type, name of a stage or of a model)."""
        return [(m.what, v) for _, m, values in marked(stage, Reads) for v in values]


def load(path: Path, kinds: dict[str, type[Stage]], overrides: list[str] | None = None) -> Recipe:
    """Reads and checks a recipe file. Everything wrong is one Permanent line."""
    raw, folders = read(path, overrides or [])
    unknown = sorted(map(str, set(raw) - TOP))
    if unknown:
        raise Permanent(
            f"{path}: unknown setting '{unknown[0]}'; a recipe has extends, name, storage, seed, "
            "hardware, models, stages"
        )
    name, seed = str(raw.get("name", path.stem)), raw.get("seed", 0)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name in ("store", "mlartifacts"):
        raise Permanent(f"{path}: name '{name}' must be lower-case letters, digits, '.', '_', '-'")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise Permanent(f"{path}: seed must be a whole number from 0 below 2^32, not {seed!r}")
    storage = raw.get("storage", "runs")
    if not isinstance(storage, str) or not storage or "://" in storage:
        raise Permanent(
            f"{path}: storage is {storage!r}; it must be a folder (on a cluster, one that every "
            "node mounts)"
        )
    models = {
        str(n): typed(ModelSpec, spec, f"{path}: model '{n}'")
        for n, spec in mapping(raw.get("models", {}), f"{path}: models").items()
    }
    stages = {}
    for stage_name, settings in mapping(raw.get("stages"), f"{path}: stages").items():
        where = f"{path}: stage '{stage_name}'"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(stage_name)):
            raise Permanent(f"{where}: a stage name is letters, digits, '_', '-'")
        settings = dict(mapping(settings, where))
        if "kind" not in settings:
            raise Permanent(
                f"{where}: setting 'kind' is missing; known: {', '.join(sorted(kinds))}"
            )
        kind = str(settings.pop("kind"))
        if kind not in kinds:
            raise Permanent(f"{where}: unknown kind '{kind}'{near(kind, kinds)}")
        if "seed" in kinds[kind].model_fields:
            settings.setdefault("seed", seed)
        if "title" in kinds[kind].model_fields:
            settings.setdefault("title", name)
        stages[str(stage_name)] = stage = typed(kinds[kind], settings, where)
        if not 0 <= getattr(stage, "seed", 0) < SEEDS:
            raise Permanent(f"{where}: setting 'seed' must be a whole number from 0 below 2^32")
    if not stages:
        raise Permanent(f"{path}: no stages; nothing to do")
    hardware = raw.get("hardware")
    if hardware is not None:
        hardware = typed(Hardware, hardware, f"{path}: hardware")
        if lost := sorted(set(hardware.rows_per_second) - set(stages)):
            raise Permanent(f"{path}: hardware: rows_per_second: no stage '{lost[0]}'")
    recipe = Recipe(name, Path(storage), folders, seed, models, stages, hardware)
    _check_references(recipe, path)
    return recipe


def _check_references(recipe: Recipe, path: Path) -> None:
    """Every name a stage reads must be defined, be of the right type, and come earlier."""
    order = list(recipe.stages)
    both = sorted(set(order) & set(recipe.models))
    if both:
        raise Permanent(f"{path}: '{both[0]}' is both a model and a stage; rename one")
    for name, stage in recipe.stages.items():
        for what, ref in recipe.reads(stage):
            where = f"{path}: stage '{name}' reads '{ref}'"
            if ref in recipe.models and what in ("weights", "model", "judge"):
                _check_model(recipe, what, ref, where)
                source = recipe.models[ref].weights
                if source not in recipe.stages:
                    continue
                if recipe.stages[source].makes != "weights":
                    raise Permanent(f"{path}: model '{ref}': stage '{source}' trains no model")
                ref, what = source, "weights"
            if ref not in recipe.stages:
                known = recipe.models if what in ("weights", "model", "judge") else {}
                if ref in recipe.models:
                    raise Permanent(
                        f"{where}, which is a model; it needs a stage that makes {what}"
                    )
                raise Permanent(
                    f"{where}, which is neither a stage nor a model of this recipe"
                    + near(ref, [*known, *order])
                )
            if what == "judge":
                raise Permanent(f"{where}, but a judge is an entry under models:")
            made = recipe.stages[ref].makes
            if what != "any" and made != ("weights" if what == "model" else what):
                raise Permanent(f"{where}, which makes {made}; it needs {what}")
            if order.index(ref) >= order.index(name):
                cycle = _path_between(recipe, ref, name)
                if cycle:
                    raise Permanent(f"{path}: a cycle: {' → '.join([name, *cycle])}")
                raise Permanent(f"{where}, which comes later; move '{ref}' above '{name}'")


def _check_model(recipe: Recipe, what: str, name: str, where: str) -> None:
    spec = recipe.models[name]
    if spec.engine == "vllm" and not spec.weights:
        raise Permanent(f"{where}: model '{name}' needs weights: (a packaged name, hub id, folder)")
    if spec.engine == "openai" and not (spec.model and spec.base_url):
        raise Permanent(f"{where}: model '{name}' needs model: and base_url:")
    if spec.engine == "service" and not spec.base_url:
        raise Permanent(f"{where}: model '{name}' needs base_url:, the address of zephyr serve")
    if spec.base_url and not re.match(r"https?://", spec.base_url):
        raise Permanent(f"{where}: model '{name}': base_url must start with http:// or https://")
    if what == "weights" and spec.engine != "vllm":
        raise Permanent(f"{where}: model '{name}' has no weights to train (engine {spec.engine})")
    if what == "model" and spec.engine in ("rules", "service"):
        raise Permanent(f"{where}: '{name}' is a {spec.engine} judge; it cannot answer prompts")


def _path_between(recipe: Recipe, start: str, goal: str) -> list[str] | None:
    """The chain of reads from `start` to `goal`, if there is one."""
    seen: set[str] = set()

    def walk(name: str) -> list[str] | None:
        if name == goal:
            return [name]
        if name in seen or name not in recipe.stages:
            return None
        seen.add(name)
        for _, ref in recipe.reads(recipe.stages[name]):
            ref = recipe.models[ref].weights or ref if ref in recipe.models else ref
            rest = walk(ref)
            if rest:
                return [name, *rest]
        return None

    return walk(start)
