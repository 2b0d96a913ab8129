"""Reads the runs to compare."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zephyr_ray.errors import Permanent
from zephyr_ray.report.render import collect_findings
from zephyr_ray.run_folder import artifacts_of, read_stages
from zephyr_ray.section import Section
from zephyr_ray.stage import Stage
from zephyr_ray.store import Artifact


@dataclass(frozen=True)
class Run:
    """A run: the artifacts that its folder links to."""

    label: str
    """Unique name on the page."""
    artifacts: dict[str, Artifact]
    """Artifacts by stage, in the order of `artifacts_of`."""
    sections: dict[str, Section]
    """Contributions of the artifacts to a report, by stage."""
    originals: dict[str, str]
    """Name of each stage before the recipe's sweep; empty if an earlier version made the run."""

    @property
    def headline(self) -> str:
        """The finding of its last stage that has one."""
        findings = collect_findings(self.sections, self.originals)
        return findings[0].text if findings else ""


def read_runs(folders: Sequence[Path], kinds: dict[str, type[Stage]]) -> list[Run]:
    """Returns the runs. Raises Permanent if one is named twice or cannot be read."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (first := seen.setdefault(folder.resolve(), folder)) is not folder:
            raise Permanent(f"{first} and {folder} are the same run; name different ones")
    return [
        _read_run(folder, label, kinds)
        for folder, label in zip(folders, _label(folders), strict=True)
    ]


def is_shared(artifacts: Sequence[Artifact]) -> bool:
    """Returns whether artifacts are the same one or copies of it. Artifacts with one key may
    differ, because training and generation are not deterministic."""
    contents = [{n: f.sha256 for n, f in a.manifest.files.items()} for a in artifacts]
    same_content = all(content == contents[0] for content in contents)
    return same_content and len({artifact.key for artifact in artifacts}) == 1


def stages_of(runs: Sequence[Run]) -> list[str]:
    """Returns the stages of all runs; one that a run lacks is placed after its predecessor in the
    run that has it."""
    names: list[str] = []
    for run in runs:
        at = 0
        for name in run.artifacts:
            if name in names:
                at = names.index(name) + 1
            else:
                names.insert(at, name)
                at += 1
    return names


def _read_run(folder: Path, label: str, kinds: dict[str, type[Stage]]) -> Run:
    artifacts = artifacts_of(folder)
    sections = {
        name: section
        for name, artifact in artifacts.items()
        if (section := _section(artifact, kinds))
    }
    return Run(label=label, artifacts=artifacts, sections=sections, originals=read_stages(folder))


def _section(artifact: Artifact, kinds: dict[str, type[Stage]]) -> Section | None:
    """Returns what an artifact contributes to a report; None if this version of the package does
    not have its kind."""
    manifest = artifact.manifest
    stage = kinds.get(manifest.kind)
    if stage is None:
        return None
    # Without validation, because another version may have made it.
    known = {name: v for name, v in manifest.settings.items() if name in stage.model_fields}
    return stage.model_construct(**known).section(artifact)


def _label(folders: Sequence[Path]) -> list[str]:
    """Returns the last components of the paths that are all different, such as a and b for
    a/quickstart and b/quickstart; the paths if there are none."""
    parts = [Path(os.path.abspath(folder)).parts[::-1] for folder in folders]
    names = (list(names) for names in zip(*parts, strict=False))
    paths = [str(folder) for folder in folders]
    return next((level for level in names if len(set(level)) == len(level)), paths)
