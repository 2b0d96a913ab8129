"""What a run will do before it starts: content keys, what is there, why the rest must run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr_ray.engines.base import Model, ModelSpec
from zephyr_ray.errors import Permanent
from zephyr_ray.models import constraints
from zephyr_ray.models.weights import fingerprint
from zephyr_ray.recipe import Recipe
from zephyr_ray.settings import FILE, OPERATIONAL, Reads, marked
from zephyr_ray.stage import Stage
from zephyr_ray.store import SCRATCH, Artifact, Store, content_key, file_digest, read_jsonl


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
        reads = [read for read in stages_read(recipe, stage) if read in steps]
        if artifact:
            why, rows = "", artifact.manifest["counts"].get("rows")
        else:
            why = _why(recipe, store, name, stage, key, identity, steps)
            known = {r: n for r in reads if (n := steps[r].rows) is not None}
            rows = stage.expected(known)
        steps[name] = Step(name, stage, key, identity, artifact, why, rows)
        if name == until:
            break
    return list(steps.values())


def stages_read(recipe: Recipe, stage: Stage) -> list[str]:
    """The stages whose artifacts a stage needs, directly or through a model's weights."""
    found = []
    for _, ref in recipe.reads(stage):
        ref = (recipe.models[ref].weights or "") if ref in recipe.models else ref
        if ref in recipe.stages and ref not in found:
            found.append(ref)
    return found


def lineage(recipe: Recipe, stage: Stage) -> list[str]:
    """All stages that lead to this one, in the order of the recipe."""
    todo, found = stages_read(recipe, stage), set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += stages_read(recipe, recipe.stages[name])
    return [name for name in recipe.stages if name in found]


def model_spec(recipe: Recipe, ref: str) -> ModelSpec:
    """How a model answers; a trained stage answers as the model it was trained from would."""
    if ref in recipe.models:
        return recipe.models[ref]
    [(_, _, [start])] = [m for m in marked(recipe.stages[ref], Reads) if m[1].what == "weights"]
    return model_spec(recipe, start).model_copy(update={"weights": ref, "demonstrations": None})


def start_weights(recipe: Recipe, ref: str) -> str | None:
    """The weights, no stage's, behind a model; a trained stage stands for what it started from."""
    weights = model_spec(recipe, ref).weights
    while weights in recipe.stages:
        [(_, _, [ref])] = [
            m for m in marked(recipe.stages[weights], Reads) if m[1].what == "weights"
        ]
        weights = model_spec(recipe, ref).weights
    return weights


def start_model(recipe: Recipe, ref: str, artifacts: dict[str, Artifact]) -> Model:
    """The model behind a name, ready to be started by any process that sees the storage."""
    spec = model_spec(recipe, ref)
    weights = spec.weights or ""
    shown: list[dict[str, Any]] = []
    if spec.demonstrations:
        for row in read_jsonl(recipe.file(spec.demonstrations)):
            sentence = constraints.KINDS[row["constraint"]["kind"]].phrasings[0]
            prompt = f"{row['instruction']} {sentence.format(**row['constraint'])}"
            shown.append({**row, "prompt": prompt})
    if spec.relevance:
        spec = spec.model_copy(update={"relevance": weights_place(recipe, spec.relevance)})
    location = (
        str(artifacts[weights].model) if weights in artifacts else weights_place(recipe, weights)
    )
    return Model(ref, spec, location, shown)


def weights_place(recipe: Recipe, weights: str) -> str:
    """A folder beside the recipe by its full path; names stay names."""
    beside = recipe.file(weights)
    return str(beside.absolute()) if weights and beside.is_dir() else weights


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
            settings[name] = [[v, _read_identity(recipe, v, reads[name].what, keys)] for v in value]
        elif name in reads and value is not None:
            settings[name] = _read_identity(recipe, value, reads[name].what, keys)
        else:
            settings[name] = value
    return {"kind": stage.kind, "version": stage.version, "settings": settings}


def _read_identity(recipe: Recipe, ref: str, what: str, keys: dict[str, str]) -> Any:
    if what not in ("weights", "model", "judge"):
        return keys[ref]
    spec = model_spec(recipe, ref)
    weights = spec.weights or ""
    identity = keys[weights] if weights in recipe.stages else None
    if identity is None and weights:
        identity = fingerprint(weights_place(recipe, weights))
    if what == "weights":
        return identity
    operational = {name for name, _, _ in marked(spec, OPERATIONAL)}
    if spec.engine in ("openai", "service"):
        operational -= {"base_url"}  # the same name is another model at another address
    settings = spec.model_dump(mode="json", exclude=operational | {"weights"})
    if spec.demonstrations:
        settings["demonstrations"] = digest(recipe.file(spec.demonstrations))
    if spec.relevance:
        settings["relevance"] = fingerprint(weights_place(recipe, spec.relevance))
    return {**settings, "weights": identity}


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and contents of its files."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return content_key({str(f.relative_to(path)): file_digest(f) for f in files})
        return file_digest(path)
    except OSError as error:
        raise Permanent(f"{path}: cannot be read ({error.strerror})") from None


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
    changed = [r for r in stages_read(recipe, stage) if r in steps and not steps[r].artifact]
    if changed:
        return f"reads {', '.join(changed)}, to do"
    try:
        record = store.storage / recipe.name / "made" / f"{name}.json"
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not made yet"
    if before["kind"] != identity["kind"]:
        return f"kind was {before['kind']}"
    if before["version"] != identity["version"]:
        return f"{stage.kind} is of a new version"
    old, new = before["settings"], identity["settings"]
    names = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
    said = [
        f"{n} was {old.get(n)}, is {new.get(n)}"
        if _short(old.get(n), new.get(n))
        else f"{n} changed"
        for n in names
    ]
    return "; ".join(said) or "its artifact was deleted"


def _short(*values: Any) -> bool:
    return all(
        value is None or isinstance(value, int | float | bool) or len(str(value)) < 16
        for value in values
    )


def remember(recipe: Recipe, store: Store, step: Step) -> None:
    """Leaves what the next plan compares with."""
    folder = store.storage / recipe.name / "made"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step.name}.json").write_text(json.dumps(step.identity), encoding="utf-8")
