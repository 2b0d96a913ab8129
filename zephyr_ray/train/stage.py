"""Defines what sft and dpo share as stages: report section, processors, memory, disk and checks."""

from zephyr_ray.demand import Footprint, Processors
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.errors import Permanent
from zephyr_ray.models.headers import tensor_shapes
from zephyr_ray.models.weights import resolve
from zephyr_ray.section import Section
from zephyr_ray.store import Artifact
from zephyr_ray.train import memory
from zephyr_ray.train.section import training_section
from zephyr_ray.train.settings import TrainingSettings

CHECKPOINTS = 2
"""Checkpoints on disk at once: the last complete one, and the one being written."""


class TrainingStage(TrainingSettings):
    """A stage that trains a model."""

    view = ("models/{name}", "model")

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
        needed = memory.worker_memory(self, shape)
        return Footprint(
            memory=self.workers * (needed.host + (0 if self.gpus_per_worker else needed.total)),
            artifact=4 * shape.parameters,  # fp32
            scratch=CHECKPOINTS * 16 * shape.parameters,  # fp32 weights and optimizer state
        )

    def check_models(self, models: dict[str, RecipeModel]) -> None:
        """Raises Permanent if lora.targets names a module that the model does not have."""
        [start] = models.values()
        modules = {
            f".{name.rpartition('.')[0]}" for name in tensor_shapes(resolve(start.main.origin))
        }
        for target in (self.lora and self.lora.targets) or []:
            if not any(module.endswith(f".{target}") for module in modules):
                names = sorted({module.rpartition(".")[2] for module in modules})
                raise Permanent(
                    f"lora.targets: the model has no module '{target}'; it has {', '.join(names)}"
                )
