"""What a run will do before it starts: content keys, what is there, why the rest must run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import read_manifest
from zephyr_ray.recipe import Recipe
from zephyr_ray.run_folder import artifact_shown
from zephyr_ray.settings import FILE, OPERATIONAL, Reads, marked
from zephyr_ray.stage import Stage
from zephyr_ray.store import SCRATCH, Artifact, Store, content_key, digest


@dataclass
class Step:
    """One stage of the plan."""

    name: str
    stage: Stage
    key: str
    identity: dict[str, Any]
    """What the key is made of; kept in the manifest so that a later plan can say what changed."""
    artifact: Artifact | None
    why: str
    rows: int | None


def make_plan(recipe: Recipe, store: Store, until: str | None = None) -> list[Step]:
    """The steps in order, up to `until`. Verifies cached artifacts; starts nothing."""
    if until is not None and until not in recipe.stages:
        raise Permanent(
            f"--until {until}: the recipe has no such stage: {', '.join(recipe.stages)}"
        )
    steps: dict[str, Step] = {}
    for name, stage in recipe.stages.items():
        identity = _identity(recipe, stage, {n: s.key for n, s in steps.items()})
        key = content_key(identity)
        artifact = store.find(stage.kind, key)
        reads = [read for read in recipe.stages_read(stage) if read in steps]
        if artifact:
            why, made = "", artifact.manifest.counts.get("rows")
            rows = None if made is None else int(made)
        else:
            why = _why(recipe, store, name, stage, key, identity, steps)
            known = {r: n for r in reads if (n := steps[r].rows) is not None}
            rows = stage.expected(known)
        steps[name] = Step(name, stage, key, identity, artifact, why, rows)
        if name == until:
            break
    return list(steps.values())


def _identity(recipe: Recipe, stage: Stage, keys: dict[str, str]) -> dict[str, Any]:
    operational = {name for name, _, _ in marked(stage, OPERATIONAL)}
    files = {name for name, _, _ in marked(stage, FILE)}
    reads = {name: mark for name, mark, _ in marked(stage, Reads)}
    settings: dict[str, Any] = {}
    for name, value in stage.model_dump(mode="json").items():
        if name in operational:
            continue
        if name in files and value is not None:
            settings[name] = digest(recipe.file(value))
        elif name in reads and isinstance(value, list):
            # Names of several things read are kept: results are told apart by them.
            settings[name] = [[v, _read_identity(recipe, v, reads[name], keys)] for v in value]
        elif name in reads and value is not None:
            settings[name] = _read_identity(recipe, value, reads[name], keys)
        else:
            settings[name] = value
    return {"kind": stage.kind, "version": stage.version, "settings": settings}


def _read_identity(recipe: Recipe, ref: str, mark: Reads, keys: dict[str, str]) -> Any:
    if not mark.is_model:
        return keys[ref]
    model = recipe.models[ref]
    return model.main.identity(keys) if mark.what == "weights" else model.identity(keys)


def _why(
    recipe: Recipe,
    store: Store,
    name: str,
    stage: Stage,
    key: str,
    identity: dict[str, Any],
    steps: dict[str, Step],
) -> str:
    """Why a stage must run, for a person."""
    if (store.folder(stage.kind, key) / SCRATCH).exists():
        return "was interrupted: goes on"
    changed = [r for r in recipe.stages_read(stage) if r in steps and not steps[r].artifact]
    if changed:
        return f"reads {', '.join(changed)}, to do"
    shown = artifact_shown(store.storage / recipe.name, name, stage.view[0])
    if shown is None:
        return "not made yet"
    try:
        before = read_manifest(shown).identity
    except ValueError:
        return "its artifact was deleted"
    if before is None:
        return "was made by an earlier version of zephyr_ray"
    if before["kind"] != identity["kind"]:
        return f"kind was {before['kind']}"
    if before["version"] != identity["version"]:
        return f"{stage.kind} is of a new version"
    old, new = before["settings"], identity["settings"]
    names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
    changes = [
        f"{n} was {old.get(n)}, is {new.get(n)}"
        if _short(old.get(n), new.get(n))
        else f"{n} changed"
        for n in names
    ]
    return "; ".join(changes) or "its artifact was deleted"


def _short(*values: Any) -> bool:
    return all(
        value is None or isinstance(value, int | float | bool) or len(str(value)) < 16
        for value in values
    )
