"""Reads and links the folder of a run, such as runs/quickstart: artifacts, models, judge."""

import json
import os
from pathlib import Path

from zephyr_ray.engines import ENGINES
from zephyr_ray.engines.model import Model
from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.manifest import Manifest, read_manifest
from zephyr_ray.settings import typed
from zephyr_ray.store import STORE, Artifact, write_atomically

STAGES_FILE = "stages.json"
"""File with the stages of the recipe in order. Manifests cannot hold the order, because runs share
artifacts; their times do not give it, because a stage may be rerun after later ones."""


def models_of(run: Path) -> dict[str, str]:
    """Returns weights by name: the models that training started from, then the trained ones by age.

    Raises Permanent if the folder is not a run or holds no trained model.
    """
    trained = {link.name: link.resolve() for link in sorted((run / "models").glob("*"))}
    if not run.is_dir():
        raise Permanent(f"there is no folder {run}; run its recipe, or correct the path")
    if not trained:
        raise Permanent(
            f"{run} has no trained model; name the folder of a run, or let its recipe train one"
        )
    manifests = {name: _manifest(folder.parent) for name, folder in trained.items()}
    order = sorted(trained, key=lambda name: manifests[name].created)
    start_models = {
        name: spec["weights"]
        for manifest in manifests.values()
        for name, spec in manifest.models.items()
        if name not in trained and spec["weights"]
    }
    return start_models | {name: str(trained[name]) for name in order}


def judge_of(run: Path) -> Model | None:
    """Returns the judge of the run's comparison; None if it has none, or if a service judged it.

    Raises Permanent if its settings are no longer valid.
    """
    for data in sorted((run / "data").glob("*")):
        manifest = _manifest(data.resolve())
        # Other stages have judges too, but only a comparison may have a control.
        if manifest.settings.keys() >= {"judge", "control"}:
            name = manifest.settings["judge"]
            settings = ENGINES[manifest.models[name]["engine"]]
            # In manifests of earlier versions, each model has the settings of all engines.
            own = {k: v for k, v in manifest.models[name].items() if k in settings.model_fields}
            wordings = own.pop("questions", None) or {}
            typed_settings = typed(settings, own, f"{data}: judge '{name}'")
            judge = Model(name, typed_settings, wordings=wordings)
            if judge.settings.served:
                return judge
    return None


def artifact_of(run: Path, stage: str) -> Artifact:
    """Returns the artifact of a stage that makes a model or data. Raises Permanent if the run has
    none."""
    folder = linked_artifact(run, stage, "models/{name}")
    if folder is None:
        names = sorted(link.name for kind in ("models", "data") for link in (run / kind).glob("*"))
        raise Permanent(
            f"{run} has no model or data set '{stage}'{suggest(stage, names)}"
            if names
            else f"{run} has no models and no data; name the folder of a run"
        )
    return Artifact(folder, _manifest(folder))


def artifacts_of(run: Path) -> dict[str, Artifact]:
    """Returns the artifacts of the run's stages that make models or data, in the order of the
    recipe; by age if an earlier version made the run. Raises Permanent if the folder is not a run,
    or an artifact was deleted."""
    if not run.is_dir():
        raise Permanent(f"there is no folder {run}; run its recipe, or correct the path")
    links = [link for kind in ("models", "data") for link in sorted((run / kind).glob("*"))]
    folders = {
        link.name: folder
        for link in links
        if (folder := linked_artifact(run, link.name, f"{link.parent.name}/{{name}}"))
    }
    if not folders:
        raise Permanent(f"{run} has no models and no data; name the folder of a run")
    artifacts = {name: Artifact(folder, _manifest(folder)) for name, folder in folders.items()}
    by_age = sorted(artifacts, key=lambda name: artifacts[name].manifest.created)
    return {name: artifacts[name] for name in [*read_stages(run), *by_age] if name in artifacts}


def write_stages(run: Path, originals: dict[str, str]) -> None:
    """Stores the stages of the recipe in order, each with the name that it had before the sweep."""
    write_atomically(run / STAGES_FILE, json.dumps(originals, indent=2) + "\n")


def read_stages(run: Path) -> dict[str, str]:
    """Returns the stages that `write_stages` stored; none if an earlier version made the run."""
    try:
        stages: dict[str, str] = json.loads((run / STAGES_FILE).read_bytes())
    except FileNotFoundError:
        return {}
    return stages


def link_artifact(run: Path, stage: str, view: tuple[str, str], artifact: Path) -> None:
    """Links the artifact under the name that a person opens; `view` is `Stage.view`.

    The link is relative, so that the storage folder can be moved. Raises Permanent if a folder
    already has that name.
    """
    name, target = view
    link = run / name.format(name=stage)
    link.parent.mkdir(parents=True, exist_ok=True)
    part = link.with_name(f".{link.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(artifact / target, link.parent))
    try:
        part.replace(link)
    except OSError:
        part.unlink()
        raise Permanent(
            f"cannot link {link} to its artifact: a folder is in the way; move it away"
        ) from None


def unlink_stale(run: Path, current: dict[str, Path]) -> None:
    """Removes links that do not point to current artifacts; `current` holds the artifacts' folders
    by the path of the link in the run's folder. Artifacts are kept."""
    for link in [run / "report.html", *run.glob("models/*"), *run.glob("data/*")]:
        folder = current.get(str(link.relative_to(run)))
        if link.is_symlink() and folder not in (link.resolve(), link.resolve().parent):
            link.unlink()


def linked_artifact(run: Path, stage: str, view: str) -> Path | None:
    """Returns the folder of the artifact that the stage's link points to; None if there is no link.
    The folder may have been deleted."""
    links = [run / v.format(name=stage) for v in (view, "data/{name}", "models/{name}")]
    link = next((link for link in links if link.is_symlink()), None)
    if link is None:
        return None
    target = link.resolve()
    return target if target.parent.name == STORE else target.parent


def _manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except ValueError as error:
        raise Permanent(f"{error}; run the recipe again") from None
