"""Reads the folder of a run, such as runs/quickstart: its models and its judge."""

import json
from pathlib import Path
from typing import Any

from zephyr_ray.engines import ENGINES
from zephyr_ray.engines.model import Model
from zephyr_ray.errors import Permanent
from zephyr_ray.store import MANIFEST


def models_of(run: Path) -> dict[str, str]:
    """Returns weights by name: first the models that training started from, then the trained ones.

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
    order = sorted(trained, key=lambda name: str(manifests[name]["created"]))
    started = {
        name: spec["weights"]
        for manifest in manifests.values()
        for name, spec in manifest.get("models", {}).items()
        if name not in trained and spec["weights"]
    }
    return started | {name: str(trained[name]) for name in order}


def judge_of(run: Path) -> Model | None:
    """Returns the judge of the run's comparison, None if it has none or uses a served one."""
    for data in sorted((run / "data").glob("*")):
        manifest = _manifest(data.resolve())
        if (data / "result.json").exists():
            name = manifest["settings"]["judge"]
            settings = ENGINES[manifest["models"][name]["engine"]]
            # Manifests of earlier versions have the settings of every engine in each model.
            known = {
                k: v for k, v in manifest["models"][name].items() if k in settings.model_fields
            }
            judge = Model(name, settings.model_validate(known))
            if judge.settings.served:
                return judge
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Permanent(f"{folder} has no readable manifest ({error}); run its recipe") from None
    return manifest
