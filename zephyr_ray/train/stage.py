"""Defines what stages that run a model on workers share: tokenizing, processors, checks; and what
sft and dpo share: run, report section, memory."""

import html
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from zephyr_ray.chat import ChatFormat
from zephyr_ray.demand import Footprint, Processors
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.formatting import list_counts
from zephyr_ray.models.checks import check_trains
from zephyr_ray.models.headers import tensor_shapes
from zephyr_ray.models.weights import find_local
from zephyr_ray.section import Chapter, Curve, Document, Place, Section
from zephyr_ray.stage import Work, log
from zephyr_ray.store import ROWS, Artifact, read_jsonl
from zephyr_ray.train import memory
from zephyr_ray.train.data import Data, TokenRows, Tokens
from zephyr_ray.train.holdout import check_sides, is_held_out
from zephyr_ray.train.job import VALIDATION, Job
from zephyr_ray.train.model import load_chat
from zephyr_ray.train.preparation import Preparation, Row, prepare_rows
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
HELD_OUT = "Validation is measured on held-out rows, with the model as it is after the step."
TIES = (
    " At step 0, rewards relative to the start model are 0 and tie, so accuracy is 0 unless "
    "rounding breaks ties."
)
NOTHING_TO_TRAIN = ("truncated_to_nothing", "prompt_fills_max_length", "same_or_empty_answers")
"""Rules that drop a row because max_length leaves nothing to train on in it. Some long rows are
normal, so `max_failed` does not limit them, but half of the rows must be left."""
MASK = "Which tokens the loss counts, as the training stage saw them."


class WorkerStage(WorkerSettings):
    """Runs a model on a group of workers."""

    columns: ClassVar[tuple[str, ...]]
    """Columns of a row's tokens."""
    row_name: ClassVar[str]
    """Name of a row in error lines."""

    def tokenize(self, chat: ChatFormat, row: Row, counts: Counter[str]) -> Tokens:
        """Returns the tokens of a row, and counts them (`preparation.Tokenize`)."""
        raise NotImplementedError

    def prepare(self, work: Work, selects: Callable[[Row], bool] | None = None) -> Data:
        """Writes scratch/data and counts it; returns the data set. `selects` returns whether a row
        is taken.

        A row that raises RowError is dropped and counted. Raises Permanent if `bad_rows` is "stop",
        if more rows are bad than `max_failed` allows, if max_length leaves nothing to train on in
        more than half of the rows, or if no row is left.
        """
        preparation = Preparation(
            path=work.inputs[self.data].file(ROWS),
            source=self.data,
            folder=work.scratch / "data",
            weights=work.models[self.model].weights,
            columns=self.columns,
            tokenize=self.tokenize,
            stops_at_bad_row=self.bad_rows == "stop",
            selects=selects,
        )
        prepared = prepare_rows(preparation, work.progress)
        work.counts |= {"truncated": 0} | prepared.counts
        work.examples |= prepared.examples
        data = TokenRows(preparation.folder)
        if prepared.first_bad and not len(data):
            raise Permanent(f"{prepared.first_bad}; no row is left to train on")
        work.check_dropped(prepared.read, sound=NOTHING_TO_TRAIN)
        self._check_cut_away(work, prepared.read)
        if not len(data):
            raise Permanent(
                f"stage '{work.name}': no {self.row_name} of '{self.data}' is left to train on"
            )
        return data

    def _check_cut_away(self, work: Work, rows: int) -> None:
        """Raises Permanent if max_length leaves nothing to train on in over half of the rows."""
        counts = {rule: work.counts.get(f"dropped/{rule}", 0) for rule in NOTHING_TO_TRAIN}
        cut = {rule: count for rule, count in counts.items() if count}
        if sum(cut.values()) > rows / 2:
            example = work.examples[f"dropped/{max(cut, key=cut.__getitem__)}"][0]
            raise Permanent(
                f"stage '{work.name}': {int(sum(cut.values()))} of {rows} rows have nothing to "
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
    """Trains a model."""

    view = ("models/{name}", "model")
    limits = "Nothing measured the safety or the biases of the model."

    def expected(self, rows: dict[str, int]) -> int | None:
        return self.split(rows)[0]

    def run(self, work: Work) -> None:
        weights = work.models[self.model].weights
        selects = self._hold_out(work)
        data = self.prepare(work, selects)
        chat = load_chat(weights)
        rows = filter(selects, read_jsonl(work.inputs[self.data].file(ROWS)))
        ansi, page = self._first_proof(chat, rows)
        log.info("%s: format: %s; trained tokens are green\n%s", work.name, chat.name, ansi)
        page = f"<p>Format: {html.escape(chat.name)}</p>{page}"
        (work.folder / "mask.html").write_text(page, encoding="utf-8")
        order = self.order(len(data))
        job = Job(self, weights, work.folder, order, reference=self.reference_file(work))
        train(work, job)

    def _hold_out(self, work: Work) -> Callable[[Row], bool] | None:
        """Prepares the validation rows in scratch/validation, and returns which rows of the data
        are trained on; None for all. Raises Permanent if a share leaves no row on one side."""
        if self.validation is None:
            return None
        source, validates, trains = self.data, None, None
        if isinstance(self.validation, str):
            source = self.validation
        else:
            share = self.validation
            check_sides(work, source, share)
            validates = partial(is_held_out, share=share)
            trains = lambda row: not is_held_out(row, share)  # noqa: E731
        part = replace(work, folder=work.scratch / "validation", counts={}, examples={})
        self.model_copy(update={"data": source}).prepare(part, validates)
        work.counts |= {f"{VALIDATION}{name}": count for name, count in part.counts.items()}
        work.examples |= {f"{VALIDATION}{name}": rows for name, rows in part.examples.items()}
        return trains

    def reference_file(self, work: Work) -> Path | None:
        """Returns the file with reference log-probabilities that an earlier stage computed."""
        return None

    def _first_proof(self, chat: ChatFormat, rows: Iterable[Row]) -> tuple[str, str]:
        """Returns the loss-mask proof of the first row that has one; `prepare` ensures one."""
        for row in rows:
            with suppress(RowError):
                return chat.proof(row[self.proven])
        raise AssertionError("prepare() raises if all rows are bad")

    def section(self, artifact: Artifact) -> Section:
        """Returns the curves of metrics.jsonl and the loss mask of mask.html."""
        chapters = []
        if curves := tuple(_curves(artifact)):
            has_rewards = any(curve.title.startswith("reward") for curve in curves)
            intro = REWARDS if has_rewards else ""
            if self.validation is not None:
                intro = HELD_OUT + (TIES if has_rewards else "")
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

        def fix(free: float) -> str:
            share = free / self.workers.least
            on_gpu = self.gpus_per_worker > 0
            return self.memory_savings(
                None if on_gpu else memory.largest_micro_batch(self, shape, share)
            )

        return Footprint(
            memory=self.workers.least
            * (needed.host + (0 if self.gpus_per_worker else needed.total)),
            artifact=4 * shape.parameters,  # fp32
            # fp32 weights and optimizer state; checkpoints leave out the weights under adapters
            scratch=CHECKPOINTS * 16 * memory.trained_parameters(self, shape),
            fix=fix,
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

    def points(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((step, row[name]) for step, row in steps if name in row)

    for name, title in CURVES.items():
        if training := points(name):
            yield Curve(title, training, validation=points(f"{VALIDATION}{name}"))
