"""Plans a run: content keys, cached artifacts, and reasons why the other stages must run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import read_manifest
from zephyr_ray.recipe import Recipe
from zephyr_ray.run_folder import linked_artifact
from zephyr_ray.settings import FILE, Reads, marked
from zephyr_ray.stage import Stage
from zephyr_ray.store import SCRATCH, Artifact, Store, content_key, digest


@dataclass
class Step:
    """One stage of the plan."""

    name: str
    stage: Stage
    identity: dict[str, Any]
    """Inputs that the key hashes; the manifest keeps them, so that a later plan can say
    what changed."""
    key: str
    artifact: Artifact | None
    """The artifact; None if it is not made yet."""
    same_as: Step | None = None
    """An earlier step of the same content that must run; this one shares its artifact."""
    reason: str = ""
    """Why the stage must run."""
    rows: int | None = None
    """Rows of the artifact, or expected rows; None if unknown."""

    @property
    def must_run(self) -> bool:
        return self.artifact is None and self.same_as is None

    @property
    def link(self) -> str:
        """Path of the link to the artifact in the run's folder."""
        return self.stage.view[0].format(name=self.name)


def make_plan(recipe: Recipe, store: Store, until: str | None = None) -> list[Step]:
    """Returns the steps in order, up to `until`. Verifies cached artifacts; starts nothing."""
    if until is not None and until not in recipe.stages:
        raise Permanent(
            f"--until {until}: the recipe has no such stage; use one of {', '.join(recipe.stages)}"
        )
    steps: dict[str, Step] = {}
    first: dict[tuple[str, str], Step] = {}
    for name, stage in recipe.stages.items():
        identity = _identity(recipe, stage, {n: s.key for n, s in steps.items()})
        key = content_key(identity)
        step = Step(name, stage, identity, key, store.find(stage.kind, key))
        if step.artifact:
            rows = step.artifact.manifest.counts.get("rows")
            step.rows = None if rows is None else int(rows)
        elif same := first.get((stage.kind, key)):
            step.same_as, step.rows = same, same.rows
            step.reason = f"is the same as {same.name}"
        else:
            first[stage.kind, key] = step
            step.reason = _rerun_reason(recipe, store, step, steps)
            known = {s.name: s.rows for s in steps.values() if s.rows is not None}
            reads = recipe.stages_read(stage)
            step.rows = stage.expected({name: known[name] for name in reads if name in known})
            if step.rows is None:
                step.rows = stage.rows_of_files(recipe.files(stage))
        steps[name] = step
        if name == until:
            break
    return list(steps.values())


def _identity(recipe: Recipe, stage: Stage, keys: dict[str, str]) -> dict[str, Any]:
    files = {name for name, _, _ in marked(stage, FILE)}
    reads = {name: mark for name, mark, _ in marked(stage, Reads)}
    settings: dict[str, Any] = {}
    for name, value in stage.identity().items():
        if name in files and value is not None:
            settings[name] = digest(recipe.file(value))
        elif name in reads and isinstance(value, list):
            # Names in a list are part of the result, so they are hashed too.
            settings[name] = [[v, _read_identity(recipe, v, reads[name], keys)] for v in value]
        elif name in reads and isinstance(value, str):
            settings[name] = _read_identity(recipe, value, reads[name], keys)
        else:
            settings[name] = value
    return {"kind": stage.kind, "version": stage.version, "settings": settings}


def _read_identity(recipe: Recipe, ref: str, mark: Reads, keys: dict[str, str]) -> Any:
    if not mark.is_model:
        return keys[ref]
    model = recipe.models[ref]
    return model.main.identity(keys) if mark.what == "weights" else model.identity(keys)


def _rerun_reason(recipe: Recipe, store: Store, step: Step, earlier: dict[str, Step]) -> str:
    """Returns why a stage must run, as text for the plan."""
    if (store.folder(step.stage.kind, step.key) / SCRATCH).exists():
        return "was interrupted; will resume"
    pending = [read for read in recipe.stages_read(step.stage) if not earlier[read].artifact]
    if pending:
        return f"reads {', '.join(pending)}, which must run first"
    previous = linked_artifact(store.storage / recipe.name, step.name, step.stage.view[0])
    if previous is None:
        return "not made yet"
    try:
        previous_identity = read_manifest(previous).identity
    except ValueError:
        return "its artifact was deleted"
    if previous_identity is None:
        return "was made by an earlier version of zephyr_ray"
    if previous_identity["kind"] != step.identity["kind"]:
        return f"kind was {previous_identity['kind']}"
    if previous_identity["version"] != step.identity["version"]:
        return f"{step.stage.kind} has a new version"
    old, new = previous_identity["settings"], step.identity["settings"]
    names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
    changes = [
        f"{n} was {old.get(n)}, is {new.get(n)}"
        if _are_short(old.get(n), new.get(n))
        else f"{n} changed"
        for n in names
    ]
    return "; ".join(changes) or "its artifact was deleted"


def _are_short(*values: Any) -> bool:
    return all(
        value is None or isinstance(value, int | float | bool) or len(str(value)) < 16
        for value in values
    )
