"""What sft and dpo share as stages: how they run, processors, memory, disk, and the report."""

from typing import Any

from zephyr_ray.chat import ChatFormat
from zephyr_ray.demand import Footprint, Processors
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.errors import Permanent
from zephyr_ray.models.headers import tensors
from zephyr_ray.models.weights import resolve
from zephyr_ray.section import Section
from zephyr_ray.stage import Work, log
from zephyr_ray.store import Artifact
from zephyr_ray.train import memory
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import load_chat
from zephyr_ray.train.section import training_section
from zephyr_ray.train.settings import TrainingSettings
from zephyr_ray.train.workers import train

CHECKPOINTS = 2
"""Checkpoints on disk at once: the last one, and the one that is being written."""


class TrainingStage(TrainingSettings):
    """A stage that trains a model."""

    view = ("models/{name}", "model")

    def prepare(self, work: Work, chat: ChatFormat, rows: list[dict[str, Any]]) -> list[int]:
        """Writes scratch/data and counts it; returns the tokens of each row's longest sequence."""
        raise NotImplementedError

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.data)

    def run(self, work: Work) -> None:
        weights = work.models[self.model].weights
        chat, rows = load_chat(weights), work.inputs[self.data].rows()
        lengths = self.prepare(work, chat, rows)
        ansi, page = chat.proof(rows[0][self.proven])
        log.info("%s: trained tokens are green\n%s", work.name, ansi)
        (work.folder / "mask.html").write_text(page, encoding="utf-8")
        order = self.order(lengths)
        train(work, Job(settings=self, weights=weights, folder=work.folder, order=order))

    def section(self, artifact: Artifact) -> Section:
        return training_section(artifact)

    def processors(self, models: dict[str, RecipeModel]) -> Processors:
        return Processors(
            cpus=self.workers * self.cpus_per_worker,
            gpus=self.workers * self.gpus_per_worker,
            lower="its workers",
        )

    def footprint(self, models: dict[str, RecipeModel]) -> Footprint:
        [start] = models.values()
        shape = start.shape()
        if shape is None:
            return Footprint()
        state = memory.training(self, shape)
        return Footprint(
            memory=self.workers * (state.host + (0 if self.gpus_per_worker else state.total)),
            artifact=4 * shape.parameters,  # fp32
            scratch=CHECKPOINTS * 16 * shape.parameters,  # fp32 weights and optimiser state
        )

    def check_models(self, models: dict[str, RecipeModel]) -> None:
        """Raises Permanent if adapters are to go onto modules that the model does not have."""
        [start] = models.values()
        modules = {f".{name.rpartition('.')[0]}" for name in tensors(resolve(start.main.origin))}
        for target in (self.lora and self.lora.targets) or []:
            if not any(module.endswith(f".{target}") for module in modules):
                known = sorted({module.rpartition(".")[2] for module in modules})
                raise Permanent(
                    f"lora.targets: the model has no module '{target}'; it has {', '.join(known)}"
                )
