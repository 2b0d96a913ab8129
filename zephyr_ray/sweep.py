"""Expands the sweep of a recipe into ordinary stages and models.

    sweep: {dpo.beta: [0.01, 0.1]}     dpo becomes dpo-beta-0.01 and dpo-beta-0.1

A stage or model that depends on swept settings is copied once per combination of their values; all
others exist once. A stage depends on what it reads, except through a list of stages: such a list
collects, so it takes all copies. A list of models is a pool, whose members decide what the stage
makes, so that stage is copied.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.formatting import setting_value
from zephyr_ray.recipe_file import mapping
from zephyr_ray.settings import OPERATIONAL, WEIGHTS, Reads, Strict, marked
from zephyr_ray.stage import Stage, Variant

LIMIT = 64
"""Maximum combinations of values."""
LONGEST_NAME = 100
"""Maximum characters of a copy's name, which is also the name of a folder."""


@dataclass(frozen=True)
class Unexpanded:
    """A recipe before its sweep."""

    where: str
    """Start of error lines."""
    stages: list[str]
    """Names of its stages, in order."""
    models: dict[str, ModelSettings]
    make: Callable[[str, dict[str, Any]], Stage]
    """Returns a stage by name, with some of its settings replaced."""


@dataclass(frozen=True)
class Expanded:
    """The stages and models of a recipe after its sweep."""

    stages: dict[str, Stage]
    models: dict[str, ModelSettings]
    variants: dict[str, Variant]
    """The stages and models that are copies, by their names."""


@dataclass(frozen=True)
class Axis:
    """The values of one swept setting."""

    stage: str
    setting: str
    short: str
    """Name of the setting in the names of copies."""
    values: dict[str, Any]
    """Values as the stage has them (mappings as the recipe has them), by the text that stands for
    each in a name."""

    @property
    def key(self) -> str:
        return f"{self.stage}.{self.setting}"


@dataclass(frozen=True)
class Point:
    """The recipe with one value of each axis."""

    labels: dict[str, str]
    """Texts of the values, by the axis's key."""
    stages: dict[str, Stage]
    """Stages with these values, by their names in the recipe."""
    axes: dict[str, list[Axis]]
    """The axes that each stage and model depends on."""

    def variant(self, original: str) -> Variant:
        axes = self.axes[original]
        return Variant(original, {a.key: a.values[self.labels[a.key]] for a in axes})

    def agrees(self, other: "Point", original: str) -> bool:
        """Returns whether both points give the same copy of a stage or model."""
        return all(self.labels[a.key] == other.labels[a.key] for a in self.axes[original])

    def name(self, original: str) -> str:
        """Returns the name of its copy, or the name itself if it depends on no axis."""
        axes = self.axes.get(original, [])
        return "-".join([original, *(f"{a.short}-{self.labels[a.key]}" for a in axes)])


def expand(recipe: Unexpanded, sweep: Any) -> Expanded:
    """Returns the recipe's stages and models, copied as `sweep` specifies. Raises Permanent if the
    sweep cannot be used."""
    axes = _axes(recipe, mapping(sweep, recipe.where))
    count = math.prod(len(axis.values) for axis in axes)
    if count > LIMIT:
        raise Permanent(
            f"{recipe.where}: {count} combinations of values, more than {LIMIT}; remove some values"
        )
    combinations = itertools.product(*(axis.values for axis in axes))
    points = [_point(recipe, axes, labels) for labels in combinations]
    expanded, origins = Expanded({}, {}, {}), dict[str, Variant]()
    for original in [*recipe.stages, *recipe.models]:
        for point in points:
            name, variant = point.name(original), point.variant(original)
            if origins.setdefault(name, variant) != variant:
                raise Permanent(
                    f"{recipe.where}: '{origins[name].of}' and '{original}' both become '{name}'; "
                    "rename one"
                )
            if len(name) > LONGEST_NAME:
                raise Permanent(
                    f"{recipe.where}: '{original}' becomes '{name[:40]}…', a name of {len(name)} "
                    f"characters, more than {LONGEST_NAME}; use shorter values"
                )
            if variant.settings:
                expanded.variants[name] = variant
            if original in recipe.stages and name not in expanded.stages:
                same = [other for other in points if point.agrees(other, original)]
                expanded.stages[name] = _copy_stage(point, original, same)
            if original in recipe.models and name not in expanded.models:
                expanded.models[name] = _copy_model(point, recipe.models[original])
    return expanded


def _point(recipe: Unexpanded, axes: list[Axis], labels: tuple[str, ...]) -> Point:
    chosen = {axis.key: text for axis, text in zip(axes, labels, strict=True)}
    stages = {
        name: recipe.make(
            name, {a.setting: a.values[chosen[a.key]] for a in axes if a.stage == name}
        )
        for name in recipe.stages
    }
    reads = {
        name: [v for _, _, values in marked(model, WEIGHTS) for v in values if v in stages]
        for name, model in recipe.models.items()
    }
    for name, stage in stages.items():
        fields = marked(stage, Reads)
        reads[name] = [v for f, m, values in fields if not _collects(stage, f, m) for v in values]
    depends = {name: [a for a in axes if a.stage in _reach(name, reads)] for name in reads}
    return Point(chosen, stages, depends)


def _reach(name: str, reads: dict[str, list[str]]) -> set[str]:
    """Returns the name and all that it reads, directly or indirectly."""
    pending, reached = [name], set[str]()
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += reads.get(name, [])
    return reached


def _collects(stage: Stage, field: str, mark: Reads) -> bool:
    return isinstance(getattr(stage, field), list) and not mark.is_model


def _copy_stage(point: Point, original: str, same: list[Point]) -> Stage:
    """Returns a stage that reads the copies at its point; its lists of stages collect the copies at
    all points in `same`, which give the same copy of the stage."""
    stage = point.stages[original]
    reads: dict[str, Any] = {}
    for field, mark, values in marked(stage, Reads):
        points = same if _collects(stage, field, mark) else [point]
        names = [name for v in values for name in dict.fromkeys(p.name(v) for p in points)]
        if isinstance(getattr(stage, field), list):
            reads[field] = names
        elif names:
            [reads[field]] = names
    return stage.model_copy(update=reads)


def _copy_model(point: Point, model: ModelSettings) -> ModelSettings:
    """Returns a model with the weights of the stages' copies at its point."""
    trained = {
        field: point.name(value)
        for field, _, values in marked(model, WEIGHTS)
        for value in values
        if value in point.stages
    }
    return model.model_copy(update=trained)


def _axes(recipe: Unexpanded, sweep: dict[Any, Any]) -> list[Axis]:
    """Returns the checked axes of the sweep."""
    settings: dict[str, dict[str, list[Any]]] = {}
    for key, values in sweep.items():
        stage, dot, setting = str(key).partition(".")
        where = f"{recipe.where}: {key}"
        if not dot or not setting:
            raise Permanent(f"{where}: not a setting of a stage; write stage.setting: [values]")
        if stage not in recipe.stages:
            raise Permanent(f"{where}: no stage '{stage}'{suggest(stage, recipe.stages)}")
        if not isinstance(values, list) or not values:
            raise Permanent(f"{where}: needs a list of values; write {key}: [value, value]")
        settings.setdefault(stage, {})[setting] = values
    short = Counter(setting for swept in settings.values() for setting in swept)
    return [
        Axis(
            stage=stage,
            setting=setting,
            short=setting if short[setting] == 1 else f"{stage}.{setting}",
            values=_values(recipe, stage, setting, swept),
        )
        for stage, swept in settings.items()
        for setting in swept
    ]


def _values(
    recipe: Unexpanded, stage: str, setting: str, swept: dict[str, list[Any]]
) -> dict[str, Any]:
    """Returns the values of a setting by their texts; `swept` holds all swept settings of
    the stage."""
    where = f"{recipe.where}: {stage}.{setting}"
    others = {name: values[0] for name, values in swept.items()}
    values: dict[str, Any] = {}
    stages: list[Stage] = []
    for written in swept[setting]:
        made = recipe.make(stage, others | {setting: written})
        field = type(made).model_fields.get(setting)
        if field is None:
            raise Permanent(f"{where}: unknown setting{suggest(setting, type(made).model_fields)}")
        if OPERATIONAL in field.metadata:
            raise Permanent(f"{where}: does not change the result; remove it from the sweep")
        value = getattr(made, setting)
        if isinstance(value, Strict | dict):
            value = written  # checks may have moved a part of it to another setting
        text = label(value)
        if not text:
            raise Permanent(f"{where}: a value has no letter or digit to name its stage by")
        if made in stages:
            raise Permanent(f"{where}: the value {text} appears twice; remove one")
        if text in values:
            raise Permanent(f"{where}: two values would both be named {text}; change one")
        values[text] = value
        stages.append(made)
    return values


def label(value: Any) -> str:
    """Returns the text that stands for a value in a name: letters, digits, '.', '_' and '-'."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = setting_value(value)
    # Without the plus sign, 1e+16 must not become 1e-16.
    return text.replace("+", "") if is_number else re.sub("[^A-Za-z0-9._-]+", "-", text).strip("-")
