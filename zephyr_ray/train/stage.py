"""Defines what stages that run a model on workers share: tokenizing, processors, checks; and what
sft and dpo share: run, report section, memory."""

import html
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from zephyr_ray.chat import ChatFormat
from zephyr_ray.demand import Footprint, Processors
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.formatting import list_counts
from zephyr_ray.messages import with_facts
from zephyr_ray.models.checks import check_trains
from zephyr_ray.models.headers import tensor_shapes
from zephyr_ray.models.weights import find_local
from zephyr_ray.section import Chapter, Curve, Document, Place, Section
from zephyr_ray.stage import Work, log
from zephyr_ray.store import Artifact, read_jsonl
from zephyr_ray.train import memory
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import load_chat
from zephyr_ray.train.settings import TrainingSettings, WorkerSettings
from zephyr_ray.train.workers import STEPS, train

CHECKPOINTS = 2
"""Checkpoints on disk at once: the last complete one, and the one being written."""
CURVES = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
}
"""Titles of the metrics that are drawn."""
REWARDS = (
    "Reward margin and accuracy are measured on the training pairs; they say nothing about "
    "held-out quality."
)
CUT_AWAY = ("truncated_to_nothing", "prompt_fills_max_length", "same_or_empty_answers")
"""Rules that drop a row because max_length leaves nothing to train of it. Some long rows are
ordinary, so `max_failed` does not limit them, but half of the rows must be left."""
Row = dict[str, Any]
Tokens = dict[str, list[int]]
MASK = "Which tokens the loss counts, as the training stage saw them."


class WorkerStage(WorkerSettings):
    """A stage that runs a model on a group of workers."""

    def prepare(self, work: Work, chat: ChatFormat, rows: list[Row]) -> list[int]:
        """Writes scratch/data and counts it; returns the length in tokens of each row's longest
        sequence."""
        raise NotImplementedError

    def tokens(
        self, work: Work, rows: list[Row], tokenize: Callable[[Row], Tokens | None]
    ) -> Iterator[Tokens]:
        """Yields the tokens of each row; `tokenize` returns None for a row that it drops itself.

        A row that raises RowError is dropped and counted. Raises Permanent if `bad_rows` is "stop",
        if more rows are bad than `max_failed` allows, or if max_length leaves nothing to train of
        more than half of the rows.
        """
        first_bad, kept = "", 0
        for row in map(with_facts, rows):
            try:
                tokens = tokenize(row)
            except RowError as error:
                bad = f"row '{row['id']}' of '{self.data}': {error}"
                if self.bad_rows == "stop":
                    raise Permanent(f"{bad}; correct it, or set bad_rows: drop") from None
                first_bad = first_bad or bad
                work.drop("bad_rows", f"{row['id']}: {error}")
                continue
            if tokens is not None:
                kept += 1
                yield tokens
        if first_bad and not kept:
            raise Permanent(f"{first_bad}; no row is left to train on")
        work.check_dropped(len(rows), sound=CUT_AWAY)
        counts = {rule: work.counts.get(f"dropped/{rule}", 0) for rule in CUT_AWAY}
        cut = {rule: count for rule, count in counts.items() if count}
        if sum(cut.values()) > len(rows) / 2:
            example = work.examples[f"dropped/{max(cut, key=cut.__getitem__)}"][0]
            raise Permanent(
                f"stage '{work.name}': {sum(cut.values()):.0f} of {len(rows)} rows have nothing to "
                f"train within max_length {self.max_length} ({list_counts(cut)}), such as "
                f"'{example}'; raise {work.name}.max_length, or correct the rows"
            )

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.data)

    def processors(self, models: dict[str, RecipeModel]) -> Processors:
        return Processors(
            cpus=self.workers.least * self.cpus_per_worker,
            gpus=self.workers.least * self.gpus_per_worker,
            lower="its workers",
        )

    def check_models(self, models: dict[str, RecipeModel]) -> None:
        """Raises Permanent if the model cannot read sequences of max_length. Without weights on
        this machine, checks only the context."""
        [start] = models.values()
        shape, folder = start.shape(), find_local(start.main.origin)
        if shape and 0 < shape.context < self.max_length:
            raise Permanent(
                f"max_length {self.max_length} is above the {shape.context} tokens of the model's "
                "context; lower max_length"
            )
        if folder is not None:
            check_trains(folder, self.max_length)


class TrainingStage(TrainingSettings, WorkerStage):
    """A stage that trains a model."""

    view = ("models/{name}", "model")

    def run(self, work: Work) -> None:
        weights = work.models[self.model].weights
        chat, rows = load_chat(weights), work.inputs[self.data].rows()
        lengths = self.prepare(work, chat, rows)
        ansi, page = self._first_proof(chat, rows)
        log.info("%s: format: %s; trained tokens are green\n%s", work.name, chat.name, ansi)
        page = f"<p>Format: {html.escape(chat.name)}</p>{page}"
        (work.folder / "mask.html").write_text(page, encoding="utf-8")
        del rows  # training needs the memory
        order = self.order(lengths)
        job = Job(self, weights, work.folder, order, reference=self.reference_file(work))
        train(work, job)

    def reference_file(self, work: Work) -> Path | None:
        """Returns the file with reference log-probabilities that an earlier stage computed."""
        return None

    def _first_proof(self, chat: ChatFormat, rows: list[Row]) -> tuple[str, str]:
        """Returns the loss-mask proof of the first row that has one; `prepare` ensures one."""
        for row in rows:
            with suppress(RowError):
                return chat.proof(row[self.proven])
        raise AssertionError("prepare() raises if all rows are bad")

    def section(self, artifact: Artifact) -> Section:
        """Returns the curves of metrics.jsonl and the loss mask of mask.html."""
        chapters = []
        if curves := tuple(_curves(artifact)):
            intro = REWARDS if any(curve.title.startswith("reward") for curve in curves) else ""
            chapters.append(Chapter("Training", Place.PROCESS, curves, intro))
        if (artifact.folder / "mask.html").is_file():
            page = Document(artifact.file("mask.html").read_text(encoding="utf-8"))
            chapters.append(Chapter("Loss mask", Place.APPENDIX, (page,), MASK))
        return Section(tuple(chapters))

    def footprint(self, models: dict[str, RecipeModel]) -> Footprint:
        [start] = models.values()
        shape = start.shape()
        if shape is None:
            return Footprint()
        needed = memory.worker_memory(self, shape)
        return Footprint(
            memory=self.workers.least
            * (needed.host + (0 if self.gpus_per_worker else needed.total)),
            artifact=4 * shape.parameters,  # fp32
            scratch=CHECKPOINTS * 16 * shape.parameters,  # fp32 weights and optimizer state
            fix=self.memory_savings(),
        )

    def check_models(self, models: dict[str, RecipeModel]) -> None:
        """Raises Permanent also if lora.targets names a module that the model does not have."""
        super().check_models(models)
        [start] = models.values()
        folder = find_local(start.main.origin)
        if folder is None:
            return
        modules = {f".{name.rpartition('.')[0]}" for name in tensor_shapes(folder)}
        for target in (self.lora and self.lora.targets) or []:
            if not any(module.endswith(f".{target}") for module in modules):
                names = sorted({module.rpartition(".")[2] for module in modules})
                raise Permanent(
                    f"lora.targets: the model has no module '{target}'; choose from "
                    f"{', '.join(names)}"
                )


def _curves(artifact: Artifact) -> Iterator[Curve]:
    """Yields the metrics that are drawn. If a step was written twice, the later line counts."""
    by_step = {row["step"]: row for row in read_jsonl(artifact.file(STEPS))}
    steps = sorted(by_step.items())
    for name, title in CURVES.items():
        if points := tuple((step, row[name]) for step, row in steps if name in row):
            yield Curve(title, points)
