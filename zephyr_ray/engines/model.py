"""A model as stages use it: as the recipe names it, and made ready to start."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zephyr_ray.engines import demonstrations
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.models.shapes import Shape, find_shape_or_size
from zephyr_ray.models.weights import fingerprint
from zephyr_ray.store import Artifact, digest


@dataclass(frozen=True)
class Model:
    """A model ready to start in any process that sees the storage: its weights are folders of it,
    packaged names or hub ids."""

    name: str
    settings: ModelSettings
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    """Worked examples, each with `prompt`, `answer` and `constraint`."""

    @property
    def weights(self) -> str:
        return str(getattr(self.settings, "weights", "") or "")


@dataclass(frozen=True)
class Weights:
    """Weights that a recipe names: a place, or the artifact of a stage that trains them."""

    origin: str
    """The folder, packaged name or hub id that they are, or that their training started from."""
    stage: str | None = None
    """The stage that trains them."""

    def identity(self, keys: dict[str, str]) -> str:
        """Returns what stands for them in content keys; `keys` are those of earlier stages."""
        return keys[self.stage] if self.stage else fingerprint(self.origin)

    def place(self, artifacts: dict[str, Artifact]) -> str:
        return str(artifacts[self.stage].model) if self.stage else self.origin


@dataclass(frozen=True)
class RecipeModel:
    """A model of the recipe, or a stage that trains one, with every name in it resolved."""

    name: str
    settings: ModelSettings
    weights: dict[str, Weights]
    """By the setting that names them."""
    files: dict[str, Path]
    """By the setting that names them."""

    @property
    def main(self) -> Weights:
        """The weights that are trained, or that answer."""
        return self.weights["weights"]

    @property
    def stages(self) -> list[str]:
        """The stages whose artifacts it needs."""
        return [w.stage for w in self.weights.values() if w.stage]

    @property
    def places(self) -> list[str]:
        """The folders, packaged names and hub ids that must exist before a run."""
        return [w.origin for w in self.weights.values() if not w.stage]

    def shape(self) -> Shape | None:
        """Returns the model's shape, if it has weights and they are at hand."""
        return find_shape_or_size(self.main.origin) if "weights" in self.weights else None

    def identity(self, keys: dict[str, str]) -> dict[str, Any]:
        """Returns what stands for the model in the keys of stages that it answers or judges."""
        return {
            **self.settings.identity(),
            **{name: weights.identity(keys) for name, weights in self.weights.items()},
            **{name: digest(path) for name, path in self.files.items()},
        }

    def ready(self, artifacts: dict[str, Artifact]) -> Model:
        """Returns the model with its weights located and its worked examples read."""
        located = {name: weights.place(artifacts) for name, weights in self.weights.items()}
        shown = demonstrations.read(path) if (path := self.files.get("demonstrations")) else []
        return Model(self.name, self.settings.model_copy(update=located), shown)

    def check_demonstrations(self) -> None:
        """Raises Permanent if its worked examples cannot be read."""
        if path := self.files.get("demonstrations"):
            demonstrations.check(path)
