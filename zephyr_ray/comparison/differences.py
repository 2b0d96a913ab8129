"""Finds the settings in which the recipes of runs differ, from the manifests of their artifacts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr_ray.comparison.runs import Run, stages_of
from zephyr_ray.formatting import setting_value
from zephyr_ray.manifest import Manifest

DIGEST = 8
"""Number of characters shown of the hash of a file's content."""
MOST_NAMES = 3
"""Maximum stages listed by name per difference."""
Settings = dict[str, Any]
Specs = dict[str, tuple[Settings, Settings]]
"""Settings and hashed settings by model."""


@dataclass(frozen=True)
class Difference:
    """A setting whose values differ."""

    names: tuple[str, ...]
    """The stages that have it, or the model."""
    setting: str
    values: tuple[str | None, ...]
    """Values by run; None if the run lacks the setting."""

    @property
    def where(self) -> str:
        if len(self.names) > MOST_NAMES:
            return f"{len(self.names)} stages"
        return ", ".join(self.names)


def find_differences(runs: Sequence[Run]) -> list[Difference]:
    """Returns the settings that differ in stages or models that several runs have. Leaves out
    settings that cannot change a result."""
    grouped: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for name in stages_of(runs):
        manifests = [
            run.artifacts[name].manifest if name in run.artifacts else None for run in runs
        ]
        made = [manifest for manifest in manifests if manifest]
        if len({manifest.key for manifest in made}) == 1:
            continue
        # Settings of different kinds cannot be compared.
        same_kind = len({manifest.kind for manifest in made}) == 1
        facts = _stage_settings if same_kind else _kind
        for setting, values in _differing([facts(m) if m else None for m in manifests]):
            grouped.setdefault((setting, values), []).append(name)
    differences = [Difference(tuple(n), s, values) for (s, values), n in grouped.items()]
    specs = [_models(run) for run in runs]
    for model in dict.fromkeys(name for by_name in specs for name in by_name):
        hashed = [_hashed(*by_name[model]) if model in by_name else None for by_name in specs]
        differences += [
            Difference((f"model {model}",), setting, values)
            for setting, values in _differing(hashed)
        ]
    return differences


def _differing(settings: Sequence[Settings | None]) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """Yields each setting whose values differ, and its values by run; None if a run lacks it."""
    flat = [None if s is None else dict(_flatten(s)) for s in settings]
    present = [s for s in flat if s is not None]
    for name in dict.fromkeys(name for s in present for name in s):
        if len({s.get(name) for s in present}) > 1:
            yield name, tuple(None if s is None else s.get(name) for s in flat)


def _flatten(settings: Settings, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    """Formats a value as a recipe writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return setting_value(value)


def _stage_settings(manifest: Manifest) -> Settings:
    identity = manifest.identity or {}
    version = {"version": identity["version"]} if identity else {}
    settings = _hashed(manifest.settings, identity.get("settings", manifest.settings))
    return {**version, **settings}


def _kind(manifest: Manifest) -> Settings:
    return {"kind": manifest.kind}


def _hashed(settings: Settings, hashed: Settings) -> Settings:
    """Returns the settings that the content key hashes; file names include part of a hash."""
    return {
        name: _with_digest(value, hashed[name])
        for name, value in settings.items()
        if name in hashed
    }


def _with_digest(value: Any, hashed: Any) -> Any:
    """Returns a file's name with the start of its content's hash; other values unchanged."""
    is_hash = isinstance(hashed, str) and len(hashed) in (16, 64) and hashed != value
    if isinstance(value, str) and is_hash and Path(value).suffix:
        return f"{Path(value).name} ({hashed[:DIGEST]})"
    return value


def _models(run: Run) -> Specs:
    """Returns the settings of each model that the run's stages read, and those that a key hashes.
    For a model that is trained but never answers or judges, only the weights are compared."""
    folders = {f"{a.manifest.kind}-{a.key}": name for name, a in run.artifacts.items()}
    specs: Specs = {}
    for artifact in run.artifacts.values():
        hashed = dict(_hashed_models(artifact.manifest))
        for name, spec in artifact.manifest.models.items():
            if name not in specs or name in hashed:
                located = {n: _stage_of(value, folders) for n, value in spec.items()}
                specs[name] = located, hashed.get(name, {"weights": None})
    return specs


def _hashed_models(manifest: Manifest) -> Iterator[tuple[str, Settings]]:
    """Yields each model that answered or judged, with its settings that the content key hashed."""
    for setting, value in (manifest.identity or {}).get("settings", {}).items():
        name = manifest.settings.get(setting)
        pairs = value if isinstance(value, list) and isinstance(name, list) else [[name, value]]
        for pair in pairs:
            match pair:
                case [str(model), dict(hashed)] if model in manifest.models:
                    yield model, hashed


def _stage_of(value: Any, folders: dict[str, str]) -> Any:
    """Returns the stage that made the model in a folder; other values unchanged."""
    if not isinstance(value, str):
        return value
    return folders.get(Path(value).parent.name, value)
