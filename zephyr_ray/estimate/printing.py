"""Prints the estimate below the plan's table: a few lines per stage that has yet to run."""

from typing import Any

from rich.console import Console
from rich.text import Text

from zephyr_ray.demand import GIB, Calls
from zephyr_ray.engines.ledger import spent_before
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.estimate import forward, training
from zephyr_ray.formatting import (
    abbreviate,
    dollars,
    gib,
    hours,
    rate_per_second,
    rounded,
    significant,
)
from zephyr_ray.manifest import read_manifest
from zephyr_ray.models.shapes import Shape, find_shape
from zephyr_ray.plan import Step
from zephyr_ray.recipe import Hardware, Recipe
from zephyr_ray.store import Store
from zephyr_ray.train.memory import Memory
from zephyr_ray.train.settings import TrainingSettings, WorkerSettings
from zephyr_ray.train.worker_count import WorkerCount

MEASURED = "as measured"
"""Marks a rate measured in an earlier run, over all of the stage's time, including validation."""
CHARACTERS = 4.0
"""Approximate characters of English text per token."""
UNKNOWN_TIME = "  time    unknown; set hardware: {gpu_memory_gib: …, tflops: …}"


def print_estimate(recipe: Recipe, store: Store, steps: list[Step]) -> None:
    """Prints the estimate."""
    lines = estimate_lines(recipe, store, steps)
    if lines:
        Console().print(Text("\n" + "\n".join(lines)), soft_wrap=True)


def estimate_lines(recipe: Recipe, store: Store, steps: list[Step]) -> list[str]:
    """Returns the lines of the estimate; none if there is nothing to do."""
    lines: list[str] = []
    cost, paid_calls, unpriced = 0.0, 0.0, set()
    rows = {step.name: step.rows for step in steps if step.rows is not None}
    row_tokens = _row_tokens(recipe, steps)
    for step in steps:
        if not step.must_run:
            continue
        if isinstance(step.stage, WorkerSettings):
            lines += _worker_lines(recipe, store, step, rows, row_tokens)
            continue
        rate, source = _rate(recipe, store, step)
        if rate and step.rows:
            lines.append(f"{step.name}: {hours(step.rows / rate / 3600)} ({source})")
        reads = {name: recipe.stages[name] for name in recipe.stages_read(step.stage)}
        for name, calls in step.stage.calls(rows, reads).items():
            model = recipe.models[name]
            if not model.settings.calls_counted:
                continue
            lines += _call_lines(recipe, step, model, model.settings.own_calls(calls))
            if model.settings.metered:
                paid_calls += calls.calls
                price = model.settings.dollars(calls)
                cost += price or 0
                if price is None:
                    unpriced.add(name)
    if paid_calls:
        missing = f", without {', '.join(sorted(unpriced))} (set price:)" if unpriced else ""
        lines.append(
            f"all endpoints: ≤ {rounded(paid_calls, 0):,} calls, about {dollars(cost)}{missing}"
        )
    if recipe.budget_usd is not None:
        spent = spent_before(store.storage, recipe.name)
        line = f"budget: {dollars(recipe.budget_usd)}, of which {dollars(spent)} are spent"
        exceeds = spent + cost > recipe.budget_usd
        lines.append(line + "; the estimate exceeds the remaining budget" * exceeds)
    return lines


def _worker_lines(
    recipe: Recipe, store: Store, step: Step, rows: dict[str, int], row_tokens: dict[str, float]
) -> list[str]:
    """Returns the lines of a stage that runs a model on workers."""
    stage: Any = step.stage
    weights = recipe.models[stage.model].main.origin
    shape = find_shape(weights)
    if shape is None:
        return [_no_estimate(step.name, weights)]
    rate, source = _rate(recipe, store, step)
    describe = _training_lines if isinstance(stage, TrainingSettings) else _forward_lines
    tokens = row_tokens.get(stage.data)
    title = f"{step.name}: {weights}, {shape.parameters:,} parameters"
    first, *others = describe(stage, shape, recipe.hardware, rows, tokens, rate, source)
    return [title + first, *others]


def _training_lines(
    stage: Any,
    shape: Shape,
    hardware: Hardware | None,
    rows: dict[str, int],
    tokens: float | None,
    rate: float | None,
    source: str,
) -> list[str]:
    """Returns the end of the title, and the other lines."""
    count, held_out = stage.split(rows)
    estimate = training.estimate(stage, shape, hardware, count, tokens, rate)
    is_partial = estimate.trained != shape.parameters
    lines = [f", {estimate.trained:,} trained" if is_partial else ""]
    lines.append(f"  memory  {_memory(estimate.memory, stage)}")
    if estimate.capacity is not None:
        lines.append(f"  {_fit(estimate, stage)}")
    bound = "≤ " if estimate.upper_bound else ""
    if estimate.steps and estimate.tokens and estimate.sequences:
        epochs = "" if stage.epochs == 1 else f" × {stage.epochs:g} epochs"
        lines.append(
            f"  work    {bound}{estimate.sequences:,} {stage.unit}{epochs} in "
            f"{bound}{estimate.steps:,} steps of {stage.global_batch}, "
            f"{bound}{abbreviate(estimate.tokens)} tokens"
        )
    if estimate.hours:
        basis = source or _basis(estimate.hours, stage.workers, hardware)
        basis += ", without the cost of offload" if stage.offload != "none" else ""
        time = hours(estimate.hours)
        time_bound = "" if source or time.startswith("<") else bound
        lines.append(f"  time    {time_bound}{time} ({basis})")
    elif estimate.steps:
        lines.append(UNKNOWN_TIME)
    if count and held_out and estimate.steps:
        lines.append(f"  validation  {_validation(stage, estimate, count, held_out, source)}")
    return lines


def _basis(slowest: float, workers: WorkerCount, hardware: Hardware | None) -> str:
    """Returns the speed that the hours assume; if workers are elastic, also the shortest time."""
    basis = f"at {hardware.tflops:g} TFLOP/s per GPU"  # type: ignore[union-attr]
    if workers.is_elastic:
        fastest = hours(slowest * workers.least / workers.most)
        basis += f" with {workers.least}; {fastest} with {workers.most}"
    return basis


def _fit(estimate: training.TrainingEstimate, stage: TrainingSettings) -> str:
    room = f"{significant((estimate.capacity or 0) / GIB)} GiB"
    if not stage.gpus_per_worker:
        room += " of free memory" + (" per worker" if stage.workers.most > 1 else "")
    if not estimate.fits:
        return f"does not fit {room}: {estimate.advice}"
    tokens = estimate.largest_micro_batch
    largest = f"up to {tokens} tokens fit"
    if tokens == stage.step_tokens:
        largest = f"even a worker's full share of the global batch ({tokens} tokens) fits"
    return f"fits {room}; micro_batch {stage.micro_batch}; {largest}"


def _validation(
    stage: Any, estimate: training.TrainingEstimate, rows: int, held_out: int, source: str
) -> str:
    times, share = training.validation(stage, estimate.steps or 0, rows, held_out)
    text = f"≤ {held_out:,} rows, {times} times"
    if MEASURED in source:
        return f"{text}, in the time above"
    return text + (f", {hours(estimate.hours * share)} more" if estimate.hours else "")


def _forward_lines(
    stage: Any,
    shape: Shape,
    hardware: Hardware | None,
    rows: dict[str, int],
    tokens: float | None,
    rate: float | None,
    source: str,
) -> list[str]:
    """Returns the end of the title, and the other lines."""
    count = rows.get(stage.data)
    estimate = forward.estimate(stage, shape, hardware, count, tokens, rate)
    lines = ["", f"  memory  {_memory(estimate.memory, stage)}"]
    if estimate.fits is not None:
        verdict = "fits" if estimate.fits else "does not fit"
        fix = f": {estimate.advice}" if estimate.advice else ""
        lines.append(f"  {verdict} {hardware.gpu_memory_gib:g} GiB{fix}")  # type: ignore[union-attr]
    bound = "≤ " if estimate.upper_bound else ""
    if count and estimate.tokens:
        work = abbreviate(estimate.tokens)
        lines.append(f"  work    {bound}{count:,} {stage.unit}, {bound}{work} tokens")
    if estimate.hours:
        basis = source or _basis(estimate.hours, stage.workers, hardware)
        time = hours(estimate.hours)
        lines.append(f"  time    {'' if source or time.startswith('<') else bound}{time} ({basis})")
    elif count:
        lines.append(UNKNOWN_TIME)
    return lines


def _memory(parts: Memory, stage: WorkerSettings) -> str:
    device = "GPU" if stage.gpus_per_worker else "worker"
    shares = {
        "weights": parts.weights,
        "gradients": parts.gradients,
        "optimizer state": parts.optimizer,
        "activations": parts.activations,
        "buffers": parts.buffers,
        "reserve": parts.reserve,
    }
    listed = ", ".join(f"{purpose} {gib(size)}" for purpose, size in shares.items() if size)
    workers = stage.workers
    devices = f"{'with the fewest of ' * workers.is_elastic}{workers.describe(device)}"
    text = f"{gib(parts.total)} per {device} ({devices}, ZeRO-{stage.zero}): {listed}"
    return text + (f"; CPU memory {gib(parts.host)} per worker" if parts.host else "")


def _call_lines(recipe: Recipe, step: Step, model: RecipeModel, calls: Calls) -> list[str]:
    tokens = abbreviate(calls.tokens_in + calls.tokens_out)
    text = f"{step.name}: {model.name}, ≤ {rounded(calls.calls, 0):,} calls, about {tokens} tokens"
    if model.settings.metered:
        cost = model.settings.dollars(calls)
        return [
            text + (f", about {dollars(cost)}" if cost is not None else ", no price (set price:)")
        ]
    if "weights" not in model.weights:
        return [text]
    shape = find_shape(model.main.origin)
    if shape is None:
        return [text, _no_estimate(f"  {model.name}", model.main.origin)]
    gpu_gib = recipe.hardware.gpu_memory_gib if recipe.hardware else None
    return [text, f"  memory  {model.settings.describe_memory(shape, gpu_gib)}"]


def _rate(recipe: Recipe, store: Store, step: Step) -> tuple[float | None, str]:
    """Returns (rate, source): rows, sequences or pairs per second over all workers, as stated in
    the recipe or else measured in an earlier run."""
    stated = recipe.hardware and recipe.hardware.rows_per_second.get(step.name)
    if stated:
        return stated, f"at {stated:g} {step.stage.unit} per second, as stated"
    newest: tuple[str, float] = ("", 0)
    for path in store.root.glob(f"{step.stage.kind}-*/manifest.json"):
        try:
            manifest = read_manifest(path.parent)
            counts, seconds = manifest.counts, manifest.seconds
            is_same = (manifest.recipe, manifest.name) == (recipe.name, step.name)
            # Training time includes startup: loading, packing, reference log-probabilities.
            rows = counts.get("sequences", counts["rows"]) * manifest.settings.get("epochs", 1)
            if is_same and seconds > 0 and manifest.created > newest[0]:
                newest = (manifest.created, rows / seconds)
        except (ValueError, KeyError, TypeError):
            continue
    created, measured = newest
    if not measured:
        return None, ""
    throughput = f"{rate_per_second(measured)} {step.stage.unit} per second"
    return measured, f"at {throughput}, {MEASURED} {created[:10]}"


def _row_tokens(recipe: Recipe, steps: list[Step]) -> dict[str, float]:
    """Returns the mean tokens per row of each stage's artifact, if known."""
    tokens: dict[str, float] = {}
    for step in steps:
        counts = step.artifact.manifest.counts if step.artifact else {}
        mean = step.stage.row_tokens(tokens)
        if counts.get("characters") and counts.get("rows"):
            mean = counts["characters"] / counts["rows"] / CHARACTERS
        if mean is not None:
            tokens[step.name] = mean
    return tokens


def _no_estimate(name: str, weights: str) -> str:
    return (
        f"{name}: no estimate: the config.json of {weights} is missing here and on the hub, or its "
        "architecture is not supported (mixture of experts); put a config.json into a folder and "
        "set weights: FOLDER"
    )
