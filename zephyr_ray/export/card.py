"""Writes the card of a data set or model: README.md with YAML front matter, as hubs read it."""

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.export.licenses import UNKNOWN
from zephyr_ray.export.lineage import Source, Step, public
from zephyr_ray.formatting import number
from zephyr_ray.masking import masked
from zephyr_ray.models.packaged import PACKAGED
from zephyr_ray.models.weights import HUB_ID
from zephyr_ray.settings import WEIGHTS, Reads, marked, not_in_key
from zephyr_ray.stage import Stage

LICENSE_WARNING = (
    "The sources have different or unknown licenses: find out what they allow before you publish "
    "this, and replace `license: unknown` above."
)
REPRODUCTION = (
    "Save this recipe, correct the paths of its files and models, and run `{command}`. Settings "
    "that affect only how the work runs, such as the number of workers, are not listed. Generated "
    "text differs between runs."
)


def write_card(
    folder: Path,
    steps: list[Step],
    sources: list[Source],
    front_matter: dict[str, Any],
    note: str,
    results: list[tuple[str, str, float]],
) -> None:
    """Writes README.md. The last of `steps` made the artifact; `front_matter` holds the fields that
    describe its files; `note` is text about the files; `results` are a model's metrics as (stage,
    metric, value)."""
    last, manifest = steps[-1], steps[-1].manifest
    artifact_type = "model" if last.stage.trains_model else last.stage.makes
    licenses = {source.license for source in sources}
    license_ = licenses.pop() if len(licenses) == 1 else UNKNOWN
    names = [s.name for s in sources if s.what == "data set" and HUB_ID.fullmatch(s.name)]
    base = base_model(steps) if last.stage.trains_model else None
    extra = {"license": license_, "tags": ["zephyr_ray", manifest.kind]}
    extra |= {"base_model": base} if base else {}
    extra |= {"datasets" if last.stage.trains_model else "source_datasets": names} if names else {}
    parts = [
        f"# {manifest.recipe}: {last.name}",
        f"The {artifact_type} of the stage `{last.name}` (kind `{manifest.kind}`, key "
        f"`{manifest.key}`) of the recipe `{manifest.recipe}`, made by zephyr_ray "
        f"{manifest.zephyr_ray} on {manifest.created[:10]}. {note}",
        "## Settings and reproduction",
        REPRODUCTION.format(command=f"zephyr run recipe.yaml --until {last.name}"),
        f"```yaml\n{_yaml(recipe_of(steps))}```",
        "## Sources",
        _table(("", "name", "license"), [(s.what, f"`{s.name}`", s.license) for s in sources]),
        "## Steps",
        _table(("step", "kind", "reads", "counts"), [_row(step) for step in steps]),
    ]
    if results:
        rows = [(stage, metric, number(value, 3)) for stage, metric, value in results]
        parts += ["## Evaluation", _table(("stage", "metric", "value"), rows)]
    limits = _limits(steps, license_ == UNKNOWN)
    parts += ["## Known limits", "\n".join(f"- {limit}" for limit in limits)]
    text = "\n\n".join(parts)
    card = f"---\n{_yaml(front_matter | extra)}---\n\n{text}\n"
    (folder / "README.md").write_text(masked(card), encoding="utf-8")


def recipe_of(steps: list[Step]) -> dict[str, Any]:
    """Returns a recipe that makes the artifacts of the steps."""
    models: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    all_names, trained = _model_names(steps), {step.name for step in steps}
    for step in steps:
        names, settings = all_names[step.name], _settings(step.stage)
        models |= {
            names[name]: public(_settings(model))
            for name, model in step.models.items()
            if names[name] not in trained  # a stage that trains a model also names that model
        }
        for setting, mark, _ in marked(step.stage, Reads):
            value = settings.get(setting) if mark.is_model else None
            if isinstance(value, list):
                settings[setting] = [names.get(name, name) for name in value]
            elif value is not None:
                settings[setting] = names.get(value, value)
        stages[step.name] = {"kind": step.manifest.kind, **public(settings)}
    return {"name": steps[-1].manifest.recipe, "models": models, "stages": stages}


def _model_names(steps: list[Step]) -> dict[str, dict[str, str]]:
    """Returns the unique names of models in a card's recipe, by step and the name there. Artifacts
    of several recipes may have been made by different models of one name."""
    made = {step.manifest.key: step.name for step in steps}
    taken: dict[str, Any] = dict.fromkeys(made.values())
    names: dict[str, dict[str, str]] = {step.name: {} for step in steps}

    def unique(name: str, settings: dict[str, Any]) -> str:
        numbered = (f"{name}-{number}" for number in count(2))
        return next(n for n in chain([name], numbered) if taken.setdefault(n, settings) == settings)

    # The content key hashes the names in a list of models, so these are the last to be changed.
    for step in sorted(steps, key=lambda step: not _lists_models(step)):
        for name, model in step.models.items():
            # A stage that trains a model also names that model.
            trained = made.get(step.manifest.reads.get(name, ""))
            names[step.name][name] = trained or unique(name, _settings(model))
    return names


def _lists_models(step: Step) -> bool:
    fields = marked(step.stage, Reads)
    return any(mark.is_model and isinstance(getattr(step.stage, f), list) for f, mark, _ in fields)


def base_model(steps: list[Step]) -> str | None:
    """Returns the hub id of the model that training started from; None if it has no hub id."""
    by_name = {step.name: step for step in steps}
    step: Step | None = steps[-1]
    weights = ""
    while step:
        reads = marked(step.stage, Reads)
        [start] = [v for _, mark, values in reads if mark.what == "weights" for v in values]
        settings = step.models[start]
        [weights] = [v for _, _, values in marked(settings, WEIGHTS) for v in values]
        step = by_name.get(weights)
    if weights in PACKAGED:
        return PACKAGED[weights].hub_id
    return weights if HUB_ID.fullmatch(weights) else None


def _limits(steps: list[Step], unknown_license: bool) -> list[str]:
    limits = [step.stage.limits for step in steps]
    limits += [model.limits for step in steps for model in step.models.values()]
    for step in steps:
        limits += [
            f"`{name}`, which `{step.name}` read, was deleted: its sources are not listed."
            for name in step.missing
        ]
    limits += [LICENSE_WARNING] if unknown_license else []
    return [limit for limit in dict.fromkeys(limits) if limit]


def _settings(settings: Stage | ModelSettings) -> dict[str, Any]:
    """Returns the settings that the manifest holds, in the order in which their class declares
    them, without those that only affect how the work runs."""
    names = settings.model_fields_set - not_in_key(settings)
    return {name: getattr(settings, name) for name in type(settings).model_fields if name in names}


def _row(step: Step) -> tuple[str, ...]:
    counts = ", ".join(f"{name} {_count(v)}" for name, v in step.manifest.counts.items())
    reads = ", ".join(f"`{name}`" for name in step.manifest.reads)
    return f"`{step.name}`", step.manifest.kind, reads, counts


def _count(value: float) -> str:
    return number(int(value) if float(value).is_integer() else value, 3)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return str(text)
