"""Exports a stage of a run as a folder for a model hub: `zephyr export`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from zephyr_ray.errors import Permanent
from zephyr_ray.export import hub
from zephyr_ray.export.card import write_card
from zephyr_ray.export.data_folder import write_data
from zephyr_ray.export.lineage import Step, read_lineage, sources
from zephyr_ray.export.model_folder import write_model
from zephyr_ray.export.model_outputs import write_model_outputs
from zephyr_ray.manifest import read_manifest
from zephyr_ray.models.weights import resolve
from zephyr_ray.run_folder import artifact_of
from zephyr_ray.stage import Stage
from zephyr_ray.store import ROWS, Artifact

FORMAT = "Load it with `datasets.load_dataset`."
OTHER_FORMS = {"completions": write_model_outputs}
"""By type of artifact, a function that also writes its data in another format and returns a
sentence about those files for the card."""


def export(
    run: Path,
    stage: str,
    folder: Path,
    dtype: str | None,
    repository: str | None,
    kinds: dict[str, type[Stage]],
    shipped: Path,
) -> int:
    """Writes the folder of a model or data set, with its card, and pushes it to a repository if
    one is named. `shipped` is the folder of recipes that this package contains. Returns the exit
    code; raises Permanent if a user must change something."""
    artifact = artifact_of(run, stage)
    is_model = artifact.model_folder.is_dir()
    if not is_model and ROWS not in artifact.manifest.files:
        raise Permanent(f"'{stage}' is neither a model nor a data set; name another stage")
    if dtype and not is_model:
        raise Permanent(f"--dtype: '{stage}' is a data set; remove --dtype")
    if folder.exists():
        raise Permanent(f"{folder} exists already; remove it, or name another folder")
    what = "model" if is_model else "dataset"
    if repository:
        hub.create_repository(repository, what)
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        part.mkdir(parents=True)
        _write(artifact, run, part, dtype or "fp32", kinds, shipped)
        part.rename(folder)
    except OSError as error:
        raise Permanent(f"cannot write {folder} ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"wrote {folder}")
    if repository:
        print(f"pushed to {hub.push(folder, repository, what)}")
    return 0


def _write(
    artifact: Artifact,
    run: Path,
    folder: Path,
    dtype: str,
    kinds: dict[str, type[Stage]],
    shipped: Path,
) -> None:
    steps = read_lineage(artifact.folder, kinds)
    if artifact.model_folder.is_dir():
        front_matter = write_model(resolve(str(artifact.model_folder)), folder, dtype)
        has_adapter = (artifact.folder / "adapter").is_dir()
        merged = " The LoRA adapter that was trained is merged into them." if has_adapter else ""
        note = f"The weights are in {dtype}.{merged}"
        results = list(_results(run, steps[-1], kinds))
    else:
        front_matter, note, results = write_data(artifact, folder), FORMAT, []
        if write := OTHER_FORMS.get(steps[-1].stage.makes):
            note += f" {write(artifact, folder)}"
    write_card(folder, steps, sources(steps, shipped), front_matter, note, results)


def _results(
    run: Path, model: Step, kinds: dict[str, type[Stage]]
) -> Iterator[tuple[str, str, float]]:
    """Yields the results of the run's stages for a model: stage, metric and value."""
    for link in sorted((run / "data").glob("*")):
        folder = link.resolve()
        if not (folder / "result.json").is_file():
            continue
        keys = {step.manifest.key for step in read_lineage(folder, kinds)}
        if model.manifest.key in keys:
            for name, value in read_manifest(folder).figures_of(model.name).items():
                yield link.name, name, value
