"""Defines a model as the recipe names it, and as an engine starts it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zephyr_ray.engines import demonstrations
from zephyr_ray.engines.answer_log import ANSWERS, AnswerLog
from zephyr_ray.engines.meter import Meter
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.judges import read_questions
from zephyr_ray.models.shapes import Shape, find_shape_or_size
from zephyr_ray.models.weights import fingerprint, resolve
from zephyr_ray.settings import WEIGHTS, marked
from zephyr_ray.store import Artifact, content_key, digest

IN_REQUEST = {"temperature", "top_p", "demonstrations", "questions", "context"}
"""Settings that the log's identity omits: each request states them, or fails above `context`."""


def check_start(name: str, settings: ModelSettings, weights: dict[str, str]) -> None:
    """Raises Permanent if the engine of a model cannot start on this machine; `weights` are those
    that exist already, by the setting that names them."""
    settings.preflight()
    folders = {setting: resolve(source) for setting, source in weights.items()}
    try:
        if "weights" in folders:
            settings.check_weights(folders["weights"])
    except Permanent as error:
        raise Permanent(f"model '{name}': {error}") from None


@dataclass(frozen=True)
class Model:
    """A model that any process with access to the storage can start: its weights are folders,
    packaged names or hub ids."""

    name: str
    settings: ModelSettings
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    """Worked examples, each with `prompt`, `answer` and `constraint`."""
    wordings: dict[str, str] = field(default_factory=dict)
    """Other wordings of a judge's questions, by their names."""
    answers: AnswerLog | None = None
    """The log of its answers; None if none is kept."""
    meter: Meter | None = None
    """The meter that admits its requests; None if they have neither limits nor a price."""

    @property
    def weights(self) -> str:
        return str(getattr(self.settings, "weights", "") or "")

    def facts(self) -> dict[str, Any]:
        """Returns its settings for a manifest, with the wordings in place of their file, which may
        be gone when the judge is served."""
        settings = self.settings.model_dump(mode="json")
        return settings | ({"questions": self.wordings} if self.wordings else {})

    def check(self) -> None:
        """Raises Permanent if its engine cannot start on this machine."""
        named = {f: value for f, _, values in marked(self.settings, WEIGHTS) for value in values}
        check_start(self.name, self.settings, named)


@dataclass(frozen=True)
class Weights:
    """Weights that a recipe names: existing ones, or the artifact of a training stage."""

    origin: str
    """A folder, packaged name or hub id: the weights themselves, or those that training started
    from."""
    stage: str | None = None
    """The stage that trains them; None if they exist already."""

    def identity(self, keys: dict[str, str]) -> str:
        """Returns what content keys hash for the weights; `keys` are those of earlier stages."""
        return keys[self.stage] if self.stage else fingerprint(self.origin)

    def locate(self, artifacts: dict[str, Artifact]) -> str:
        """Returns the folder, packaged name or hub id to load."""
        return str(artifacts[self.stage].model_folder) if self.stage else self.origin


@dataclass(frozen=True)
class RecipeModel:
    """A model of the recipe, or one that a stage trains, with all names resolved."""

    name: str
    settings: ModelSettings
    weights: dict[str, Weights]
    """Weights by the setting that names them."""
    files: dict[str, Path]
    """Files by the setting that names them."""

    @property
    def main(self) -> Weights:
        """The weights of the model itself."""
        return self.weights["weights"]

    @property
    def stages(self) -> list[str]:
        """The stages whose artifacts the model needs."""
        return [w.stage for w in self.weights.values() if w.stage]

    @property
    def sources(self) -> dict[str, str]:
        """Folders, packaged names and hub ids that must exist before a run, by the setting that
        names them."""
        return {f: w.origin for f, w in self.weights.items() if not w.stage}

    def shape(self) -> Shape | None:
        """Returns the model's shape; None if it has no weights or their config is not available."""
        return find_shape_or_size(self.main.origin) if "weights" in self.weights else None

    def limit(self) -> int | None:
        """Returns the maximum tokens of prompt and answer together, None if unknown. Raises
        Permanent if a setting exceeds the model's limit."""
        try:
            return self.settings.limit(self.shape())
        except Permanent as error:
            raise Permanent(f"model '{self.name}': {error}") from None

    def identity(self, keys: dict[str, str]) -> dict[str, Any]:
        """Returns what content keys hash for a model that answers or judges."""
        return {
            **self.settings.identity(),
            **{name: weights.identity(keys) for name, weights in self.weights.items()},
            **{name: digest(path) for name, path in self.files.items()},
        }

    def answer_log(self, storage: Path, keys: dict[str, str], seed: int) -> AnswerLog:
        """Returns the log of its answers for a stage with this seed; `keys` are those of earlier
        stages. Models share one if they answer the same request in the same way."""
        identity = {n: v for n, v in self.identity(keys).items() if n not in IN_REQUEST}
        return AnswerLog(storage / ANSWERS / content_key(identity), seed)

    def to_model(
        self,
        artifacts: dict[str, Artifact],
        answers: AnswerLog | None = None,
        meter: Meter | None = None,
    ) -> Model:
        """Returns the model with its weights and files located and its files read;
        `answers` and `meter` are those of its requests."""
        located = {name: str(path) for name, path in self.files.items()}
        located |= {name: weights.locate(artifacts) for name, weights in self.weights.items()}
        path, questions = self.files.get("demonstrations"), self.files.get("questions")
        return Model(
            self.name,
            self.settings.model_copy(update=located),
            demonstrations=demonstrations.read(path) if path else [],
            wordings=read_questions(questions) if questions else {},
            answers=answers,
            meter=meter,
        )

    def check(self) -> None:
        """Raises Permanent if its engine cannot start on this machine, or one of its files is
        invalid."""
        check_start(self.name, self.settings, self.sources)
        self.check_files()

    def check_files(self) -> None:
        """Raises Permanent if its demonstrations or questions are invalid."""
        if path := self.files.get("demonstrations"):
            demonstrations.check(path)
        if path := self.files.get("questions"):
            read_questions(path)
