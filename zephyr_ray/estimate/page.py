"""The estimate below the plan's table: every stage that is still to do, in a few lines each."""

from typing import Any

from rich.console import Console
from rich.text import Text

from zephyr_ray.demand import Calls
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.estimate import training
from zephyr_ray.formatting import gib, hours, millions
from zephyr_ray.manifest import read_manifest
from zephyr_ray.models.shapes import find_shape
from zephyr_ray.plan import Step
from zephyr_ray.recipe import Recipe
from zephyr_ray.store import Store
from zephyr_ray.train.settings import TrainingSettings

CHARACTERS = 4.0
"""Characters of English text per token, about."""


def print_estimate(recipe: Recipe, store: Store, steps: list[Step]) -> None:
    estimate = lines(recipe, store, steps)
    if estimate:
        Console().print(Text("\n" + "\n".join(estimate)), soft_wrap=True)


def lines(recipe: Recipe, store: Store, steps: list[Step]) -> list[str]:
    """Returns the estimate as text, empty if nothing is to do."""
    written: list[str] = []
    dollars, paid_calls, unpriced = 0.0, 0.0, set()
    rows = {step.name: step.rows for step in steps if step.rows is not None}
    tokens = _tokens_of_rows(recipe, steps)
    for step in steps:
        if step.artifact:
            continue
        if isinstance(step.stage, TrainingSettings):
            written += _training(recipe, store, step, rows, tokens)
            continue
        rate, source = _rate(recipe, store, step)
        if rate and step.rows:
            written.append(f"{step.name}: {hours(step.rows / rate / 3600)} ({source})")
        reads = {name: recipe.stages[name] for name in recipe.stages_read(step.stage)}
        for name, calls in step.stage.calls(rows, reads).items():
            model = recipe.models[name]
            if not model.settings.asked:
                continue
            written += _asked(recipe, step, model, calls)
            if model.settings.metered:
                paid_calls += calls.calls
                price = model.settings.dollars(calls)
                dollars += price or 0
                if price is None:
                    unpriced.add(name)
    if paid_calls:
        missing = f", without {', '.join(sorted(unpriced))} (no price:)" if unpriced else ""
        written.append(f"all endpoints: ≤ {paid_calls:,.0f} calls, about ${dollars:,.0f}{missing}")
    return written


def _training(
    recipe: Recipe, store: Store, step: Step, rows: dict[str, int], tokens: dict[str, float]
) -> list[str]:
    stage: Any = step.stage
    weights = recipe.models[stage.model].main.origin
    shape = find_shape(weights)
    if shape is None:
        return [_unknown(step.name, weights)]
    rate, source = _rate(recipe, store, step)
    hardware = recipe.hardware
    found = training.estimate(
        stage, shape, hardware, rows.get(stage.data), tokens.get(stage.data), rate
    )
    told = [f"{step.name}: {weights}, {found.parameters:,} parameters"]
    if found.trained != found.parameters:
        told[0] += f", {found.trained:,} trained"
    told.append(f"  memory  {_memory(found, stage)}")
    if found.fits is False:
        told.append(f"  does not fit {hardware.gpu_memory_gib:g} GiB: {found.advice}")  # type: ignore[union-attr]
    elif found.fits:
        largest = f"{found.most}"
        if found.most == stage.global_batch // stage.workers:
            largest += ", a step's share,"
        told.append(
            f"  fits {hardware.gpu_memory_gib:g} GiB; micro batch {found.micro}, "  # type: ignore[union-attr]
            f"up to {largest} would fit"
        )
    most = "≤ " if found.bound else ""
    if found.steps and found.tokens and found.sequences:
        unit = stage.unit
        epochs = "" if stage.epochs == 1 else f" × {stage.epochs:g}"
        told.append(
            f"  work    {most}{found.sequences:,} {unit}{epochs} in {most}{found.steps:,} "
            f"steps of {stage.global_batch}, {most}{millions(found.tokens)} tokens"
        )
    if found.hours:
        said = source or f"at {hardware.tflops:g} TFLOP/s a GPU"  # type: ignore[union-attr]
        said += ", without what offload costs" if stage.offload != "none" else ""
        told.append(f"  time    {'' if source else most}{hours(found.hours)} ({said})")
    elif found.steps:
        told.append("  time    not known: state hardware: {tflops: …} or {rows_per_second: …}")
    return told


def _memory(found: training.Training, stage: TrainingSettings) -> str:
    parts = found.memory
    place = "GPU" if stage.gpus_per_worker else "worker"
    shares = {
        "weights": parts.weights,
        "gradients": parts.gradients,
        "optimiser": parts.optimizer,
        "activations": parts.activations,
        "buffers": parts.buffers,
        "reserve": parts.reserve,
    }
    told = ", ".join(f"{what} {gib(size)}" for what, size in shares.items() if size)
    text = f"{gib(parts.total)} a {place} ({stage.workers} of them, ZeRO-{stage.zero}): {told}"
    return text + (f"; and {gib(parts.host)} a worker on its node" if parts.host else "")


def _asked(recipe: Recipe, step: Step, model: RecipeModel, calls: Calls) -> list[str]:
    tokens = millions(calls.tokens_in + calls.tokens_out)
    text = f"{step.name}: {model.name}, ≤ {calls.calls:,.0f} calls, about {tokens} tokens"
    if model.settings.metered:
        dollars = model.settings.dollars(calls)
        return [
            text + (f", about ${dollars:,.0f}" if dollars is not None else ", no price: stated")
        ]
    if "weights" not in model.weights:
        return [text]
    shape = find_shape(model.main.origin)
    if shape is None:
        return [text, _unknown(f"  {model.name}", model.main.origin)]
    size = recipe.hardware.gpu_memory_gib if recipe.hardware else None
    return [text, f"  memory  {model.settings.room(shape, size)}"]


def _rate(recipe: Recipe, store: Store, step: Step) -> tuple[float | None, str]:
    """(rows, sequences or pairs a second, where that is from): stated, else measured here."""
    stated = recipe.hardware and recipe.hardware.rows_per_second.get(step.name)
    if stated:
        return stated, f"at {stated:g} {_unit(step)} a second in all, as stated"
    newest: tuple[str, float] = ("", 0)
    for path in store.root.glob(f"{step.stage.kind}-*/manifest.json"):
        try:
            manifest = read_manifest(path.parent)
            counts, seconds = manifest.counts, manifest.seconds
            same = (manifest.recipe, manifest.name) == (recipe.name, step.name)
            # Training is measured with its start: loading, packing, the reference.
            done = counts.get("sequences", counts["rows"]) * manifest.settings.get("epochs", 1)
            if same and seconds > 0 and manifest.created > newest[0]:
                newest = (manifest.created, done / seconds)
        except (ValueError, KeyError, TypeError):
            continue
    return (
        (newest[1], f"at {newest[1]:.2g} {_unit(step)} a second, as measured {newest[0][:10]}")
        if newest[1]
        else (None, "")
    )


def _unit(step: Step) -> str:
    return str(getattr(step.stage, "unit", "rows"))


def _tokens_of_rows(recipe: Recipe, steps: list[Step]) -> dict[str, float]:
    """Returns the mean tokens per row of each stage's artifact, as far as they are known."""
    tokens: dict[str, float] = {}
    for step in steps:
        counts = step.artifact.manifest.counts if step.artifact else {}
        known = step.stage.row_tokens(tokens)
        if counts.get("characters") and counts.get("rows"):
            known = counts["characters"] / counts["rows"] / CHARACTERS
        if known is not None:
            tokens[step.name] = known
    return tokens


def _unknown(name: str, weights: str) -> str:
    return (
        f"{name}: no estimate: the config.json of {weights} is neither here nor on a hub that "
        "answers (put it into a folder and plan with weights: FOLDER), or is of a kind that is not "
        "reckoned with, such as a mixture of experts"
    )
