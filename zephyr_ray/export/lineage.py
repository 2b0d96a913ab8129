"""Traces an artifact back to its seeds, published data and models, through the manifests."""

from collections.abc import Iterator
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from typing import Any

from zephyr_ray.engines import ENGINES
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.export import licenses
from zephyr_ray.manifest import Manifest, read_manifest
from zephyr_ray.masking import masked
from zephyr_ray.settings import DATASET, FILE, WEIGHTS, Reads, marked
from zephyr_ray.stage import Stage


@dataclass(frozen=True)
class Step:
    """One artifact of a lineage."""

    name: str
    """Unique name in the lineage."""
    manifest: Manifest
    stage: Stage
    """Settings of the step, with the names of stages in the lineage."""
    models: dict[str, ModelSettings]
    """Models that the step read. If a stage trained a model, `weights` is the name of its step."""
    missing: tuple[str, ...]
    """Names by which the step read artifacts that have been deleted since."""


@dataclass(frozen=True)
class Source:
    """An input that no stage made: a file, a data set, or a model."""

    what: str
    name: str
    license: str


def read_lineage(artifact: Path, kinds: dict[str, type[Stage]]) -> list[Step]:
    """Returns the steps that lead to an artifact, each after the steps it was made from."""
    steps: dict[str, Step] = {}

    def visit(folder: Path) -> None:
        manifest = read_manifest(folder)
        missing = []
        for name, key in manifest.reads.items():
            source = next((f for f in folder.parent.glob(f"*-{key}") if _is_complete(f)), None)
            if source is None:
                missing.append(name)
            elif key not in steps:
                visit(source)
        names = {n: steps[key].name for n, key in manifest.reads.items() if key in steps}
        taken = {step.name for step in steps.values()}
        name = manifest.name or manifest.kind
        steps[manifest.key] = Step(
            f"{name}-{manifest.key}" if name in taken else name,
            manifest,
            _stage(manifest, kinds, names),
            {n: _model(spec, steps) for n, spec in manifest.models.items()},
            tuple(missing),
        )

    visit(artifact)
    return list(steps.values())


def sources(steps: list[Step], shipped: Path) -> list[Source]:
    """Returns the inputs of the steps that no stage made, once each. `shipped` is the folder of
    recipes and seed files that this package contains."""
    names = {step.name for step in steps}
    # The license is compared too, because files in different folders may share a name.
    return list(dict.fromkeys(s for step in steps for s in _sources(step, names, shipped)))


def _sources(step: Step, names: set[str], shipped: Path) -> Iterator[Source]:
    hashed = (step.manifest.identity or {}).get("settings", {})
    for _, _, values in marked(step.stage, DATASET):
        for value in values:
            yield Source("data set", public(value), licenses.license_of_dataset(value))
    for name, _, values in marked(step.stage, FILE):
        for value in values:
            license_ = licenses.license_of_file(hashed.get(name), shipped)
            yield Source("file", public(value), license_)
    model_identities = dict(_model_identities(step.stage, hashed))
    for name, model in step.models.items():
        weights = [value for _, _, values in marked(model, WEIGHTS) for value in values]
        for value in weights:
            if value not in names:
                yield Source("model", public(value), licenses.license_of_model(value))
        if not weights and model.calls_counted:
            spec = step.manifest.models[name]
            parts = [str(spec[part]) for part in ("model", "base_url") if spec.get(part)]
            yield Source("model", masked(" at ".join(parts)) or name, "terms of its provider")
        for setting, _, values in marked(model, FILE):
            digest = model_identities.get(name, {}).get(setting)
            for value in values:
                yield Source("file", public(value), licenses.license_of_file(digest, shipped))


def public(value: Any) -> Any:
    """Returns a setting for a card. A path that is absolute or leads out of the recipe's folder
    may name private folders, so it is cut to its last part."""
    if isinstance(value, dict):
        return {name: public(part) for name, part in value.items()}
    if isinstance(value, list):
        return [public(part) for part in value]
    if isinstance(value, str) and normpath(value).startswith(("/", "~", "file:/", "../")):
        return Path(value).name
    return value


def _model_identities(stage: Stage, identities: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the name of each model that the stage read, and what the content key hashed for it."""
    for setting, mark, values in marked(stage, Reads):
        identity = identities.get(setting)
        named = identity if isinstance(identity, list) else [(v, identity) for v in values]
        for name, value in named if mark.is_model else ():
            if isinstance(value, dict):
                yield name, value


def _stage(manifest: Manifest, kinds: dict[str, type[Stage]], names: dict[str, str]) -> Stage:
    """Returns the stage of a manifest, without validation, because another version may have made
    it. Raises Permanent if its kind is unknown."""
    try:
        stage = _construct(kinds[manifest.kind], manifest.settings)
    except KeyError:
        raise Permanent(
            f"stage '{manifest.name}' is of kind '{manifest.kind}', which this version of "
            "zephyr_ray does not know; use the version that made it"
        ) from None
    renamed: dict[str, Any] = {}
    for setting, mark, _ in marked(stage, Reads):
        value = getattr(stage, setting)
        if isinstance(value, list):
            renamed[setting] = [names.get(v, v) for v in value]
        elif isinstance(value, str) and not mark.is_model:
            renamed[setting] = names.get(value, value)
    return stage.model_copy(update=renamed)


def _model(spec: dict[str, Any], steps: dict[str, Step]) -> ModelSettings:
    model = _construct(ENGINES[spec["engine"]], spec)
    folders = {f"{s.manifest.kind}-{key}": s.name for key, s in steps.items()}
    trained = {
        setting: folders[folder]
        for setting, _, values in marked(model, WEIGHTS)
        for value in values
        if (folder := Path(value).parent.name) in folders
    }
    return model.model_copy(update=trained)


def _construct(kind: Any, settings: dict[str, Any]) -> Any:
    known = {name: value for name, value in settings.items() if name in kind.model_fields}
    return kind.model_construct(**known)


def _is_complete(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder))
    except ValueError:
        return False
