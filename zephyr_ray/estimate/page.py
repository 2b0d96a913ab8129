"""The estimate below the plan's table: every stage that is still to do, in a few lines each."""

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from zephyr_ray.estimate import asking, memory, training
from zephyr_ray.estimate.shapes import Shape, find_shape
from zephyr_ray.models.vllm import KV_CACHE_BYTES
from zephyr_ray.plan import Step, start_weights, weights_place
from zephyr_ray.recipe import Recipe
from zephyr_ray.store import Store
from zephyr_ray.train.settings import TrainingSettings

CHARACTERS = 4.0
"""Of English text in one token, about."""
UNITS = {"sft": "sequences", "dpo": "pairs"}
"""What a training stage counts its work in."""


def print_estimate(recipe: Recipe, store: Store, steps: list[Step]) -> None:
    found = lines(recipe, store, steps)
    if found:
        Console().print(Text("\n" + "\n".join(found)), soft_wrap=True)


def lines(recipe: Recipe, store: Store, steps: list[Step]) -> list[str]:
    """The estimate as text, empty where nothing is to do."""
    by_name = {step.name: step for step in steps}
    told: list[str] = []
    dollars, calls, unpriced = 0.0, 0.0, set()
    for step in steps:
        if step.artifact:
            continue
        if isinstance(step.stage, TrainingSettings):
            told += _training(recipe, store, step, by_name)
            continue
        rate, source = _rate(recipe, store, step)
        if rate and step.rows:
            told.append(f"{step.name}: {_hours(step.rows / rate / 3600)} ({source})")
        for asked in asking.calls(recipe, step, by_name):
            told += _asked(recipe, step, asked)
            if asked.spec.engine == "openai":
                calls += asked.calls
                dollars += asked.dollars or 0
                if asked.spec.price is None:
                    unpriced.add(asked.model)
    if calls:
        missing = f", without {', '.join(sorted(unpriced))} (no price:)" if unpriced else ""
        told.append(f"all endpoints: ≤ {calls:,.0f} calls, about ${dollars:,.0f}{missing}")
    return told


def _training(recipe: Recipe, store: Store, step: Step, steps: dict[str, Step]) -> list[str]:
    stage: Any = step.stage
    weights = start_weights(recipe, stage.model) or ""
    shape = find_shape(weights_place(recipe, weights))
    if shape is None:
        return [_unknown(step.name, weights)]
    rate, source = _rate(recipe, store, step)
    data = steps[stage.data]
    found = training.estimate(
        stage, shape, recipe.hardware, data.rows, _row_tokens(data, steps), rate
    )
    told = [f"{step.name}: {weights}, {found.parameters:,} parameters"]
    if found.trained != found.parameters:
        told[0] += f", {found.trained:,} trained"
    told.append(f"  memory  {_memory(found, stage)}")
    if found.fits is False:
        told.append(f"  does not fit {recipe.hardware.gpu_memory_gib:g} GiB: {found.advice}")  # type: ignore[union-attr]
    elif found.fits:
        largest = f"{found.most}"
        if found.most == stage.global_batch // stage.workers:
            largest += ", a step's share,"
        told.append(
            f"  fits {recipe.hardware.gpu_memory_gib:g} GiB; micro batch {found.micro}, "  # type: ignore[union-attr]
            f"up to {largest} would fit"
        )
    most = "≤ " if found.bound else ""
    if found.steps and found.tokens and found.sequences:
        unit = UNITS[stage.kind]
        epochs = "" if stage.epochs == 1 else f" × {stage.epochs:g}"
        told.append(
            f"  work    {most}{found.sequences:,} {unit}{epochs} in {most}{found.steps:,} "
            f"steps of {stage.global_batch}, {most}{_millions(found.tokens)} tokens"
        )
    if found.hours:
        said = source or f"at {recipe.hardware.tflops:g} TFLOP/s a GPU"  # type: ignore[union-attr]
        said += ", without what offload costs" if stage.offload != "none" else ""
        told.append(f"  time    {'' if source else most}{_hours(found.hours)} ({said})")
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
        "reserve": memory.RESERVE,
    }
    told = ", ".join(f"{what} {_gib(size)}" for what, size in shares.items() if size)
    text = f"{_gib(parts.total)} a {place} ({stage.workers} of them, ZeRO-{stage.zero}): {told}"
    return text + (f"; and {_gib(parts.host)} a worker on its node" if parts.host else "")


def _asked(recipe: Recipe, step: Step, asked: asking.Calls) -> list[str]:
    spec = asked.spec
    tokens = _millions(asked.tokens_in + asked.tokens_out)
    told = f"{step.name}: {asked.model}, ≤ {asked.calls:,.0f} calls, about {tokens} tokens"
    if spec.engine == "openai":
        dollars = asked.dollars
        return [
            told + (f", about ${dollars:,.0f}" if dollars is not None else ", no price: stated")
        ]
    if spec.engine != "vllm":
        return [told]
    weights = start_weights(recipe, asked.model) or ""
    shape = find_shape(weights_place(recipe, weights))
    if shape is None:
        return [told, _unknown(f"  {asked.model}", weights)]
    return [told, f"  memory  {_engine(recipe, spec, shape)}"]


def _engine(recipe: Recipe, spec: Any, shape: Shape) -> str:
    one = shape.kv_bytes(min(spec.context, shape.context or spec.context))
    each = f"KV cache {_gib(one)} a conversation of {spec.context} tokens"
    if not spec.gpus or recipe.hardware is None:
        cache = "" if spec.gpus else f" of {_gib(KV_CACHE_BYTES)}"
        return f"{_gib(2 * shape.parameters)} of weights an actor; {each}{cache}"
    size = recipe.hardware.gpu_memory_gib
    weights, left = memory.engine(shape, size * memory.GIB)
    if left < one:
        return (
            f"does not fit {size:g} GiB: weights {_gib(weights)}, {each}; a GPU with more memory, "
            "a shorter context: or an endpoint (engine: openai) that holds it on several"
        )
    room = int(left / one)
    return f"fits {size:g} GiB: weights {_gib(weights)}, {each}, room for {room} at a time"


def _rate(recipe: Recipe, store: Store, step: Step) -> tuple[float | None, str]:
    """(rows, sequences or pairs a second, where that is from): stated, else measured here."""
    stated = recipe.hardware and recipe.hardware.rows_per_second.get(step.name)
    if stated:
        return stated, f"at {stated:g} {_unit(step)} a second in all, as stated"
    newest: tuple[str, float] = ("", 0)
    for path in store.root.glob(f"{step.stage.kind}-*/manifest.json"):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            counts, seconds = manifest["counts"], manifest["seconds"]
            same = (manifest["recipe"], manifest["name"]) == (recipe.name, step.name)
            # Training is measured with its start: loading, packing, the reference.
            done = counts.get("sequences", counts["rows"]) * manifest["settings"].get("epochs", 1)
            if same and seconds > 0 and manifest["created"] > newest[0]:
                newest = (manifest["created"], done / seconds)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return (
        (newest[1], f"at {newest[1]:.2g} {_unit(step)} a second, as measured {newest[0][:10]}")
        if newest[1]
        else (None, "")
    )


def _unit(step: Step) -> str:
    return UNITS.get(step.stage.kind, "rows")


def _row_tokens(data: Step, steps: dict[str, Step]) -> float | None:
    """Tokens of one row of training data on average, as far as they are known before it is made."""
    if data.artifact:
        counts = data.artifact.manifest["counts"]
        if counts.get("characters") and counts.get("rows"):
            return float(counts["characters"] / counts["rows"] / CHARACTERS)
    stage: Any = data.stage
    if stage.kind == "published":
        known: float | None = stage.tokens()
        return known
    if stage.kind == "clean":
        return _row_tokens(steps[stage.dialogues], steps)
    return None


def _unknown(name: str, weights: str) -> str:
    return (
        f"{name}: no estimate: the config.json of {weights} is neither here nor on a hub that "
        "answers (put it into a folder and plan with weights: FOLDER), or is of a kind that is not "
        "reckoned with, such as a mixture of experts"
    )


def _gib(size: float) -> str:
    gib = size / memory.GIB
    return (
        f"{gib:.0f} GiB" if gib >= 99.5 else f"{gib:.1f} GiB" if gib >= 0.95 else f"{gib:.2f} GiB"
    )


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.0f} M" if tokens >= 1e7 else f"{tokens / 1e6:.2g} M"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
