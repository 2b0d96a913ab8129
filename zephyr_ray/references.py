"""Resolves all names in a recipe: what stages read, and which weights models start from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zephyr_ray.engines.model import RecipeModel, Weights
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.settings import FILE, WEIGHTS, Reads, marked
from zephyr_ray.stage import Stage


@dataclass(frozen=True)
class References:
    """The names of one recipe, to be resolved once."""

    where: str
    """Start of error lines: the recipe's path."""
    settings: dict[str, ModelSettings]
    """Settings of the recipe's models."""
    stages: dict[str, Stage]
    locate: Callable[[str], Path]
    """Returns the path of a file or folder that the recipe names."""

    def models(self) -> dict[str, RecipeModel]:
        """Returns the models by the names that stages use: those of the recipe, and stages that
        train one. Raises Permanent if a name is undefined, of the wrong type, or defined later."""
        if duplicates := sorted(set(self.stages) & set(self.settings)):
            raise Permanent(
                f"{self.where}: '{duplicates[0]}' is both a model and a stage; rename one"
            )
        for name, settings in self.settings.items():
            for source in _named(settings, WEIGHTS):
                if source in self.stages and not self.stages[source].trains_model:
                    raise Permanent(
                        f"{self.where}: model '{name}': stage '{source}' trains no model; name one "
                        "that does"
                    )
        for name, stage in self.stages.items():
            for _, mark, refs in marked(stage, Reads):
                for ref in refs:
                    self._check(name, mark, ref)
        trained = [name for name, stage in self.stages.items() if stage.trains_model]
        return {name: self._model(name) for name in [*self.settings, *trained]}

    def _check(self, name: str, mark: Reads, ref: str) -> None:
        where = f"{self.where}: stage '{name}' reads '{ref}'"
        if ref in self.settings:
            if not mark.is_model:
                wanted = "" if mark.what == "any" else f" that makes {mark.what}"
                raise Permanent(f"{where}, which is a model; name a stage{wanted}")
            self._check_use(where, mark, ref, mark.forms(self.stages[name]))
            for source in _named(self.settings[ref], WEIGHTS):
                if source in self.stages:
                    self._check_order(f"{self.where}: stage '{name}' reads", name, source)
        elif ref in self.stages:
            if mark.what == "judge":
                raise Permanent(
                    f"{where}, which is a stage; name a judge that is defined under 'models'"
                )
            makes, required = self.stages[ref].makes, mark.artifact
            if required not in ("any", makes):
                raise Permanent(f"{where}, which makes {makes}; name a stage that makes {required}")
            self._check_order(f"{self.where}: stage '{name}' reads", name, ref)
        else:
            names = [*(self.settings if mark.is_model else []), *self.stages]
            raise Permanent(
                f"{where}, which is neither a stage nor a model of this recipe{suggest(ref, names)}"
            )

    def _check_use(self, where: str, mark: Reads, ref: str, forms: list[str]) -> None:
        settings = self.settings[ref]
        if mark.what == "weights" and "weights" not in settings.uses:
            raise Permanent(
                f"{where}: model '{ref}' has no weights (engine {settings.engine}); name one "
                "that has weights"
            )
        if mark.what == "model" and "model" not in settings.uses:
            raise Permanent(
                f"{where}: '{ref}' is a {settings.engine} judge, which answers no prompts; name a "
                "language model"
            )
        for form in forms:
            if not settings.judges(form):
                raise Permanent(
                    f"{where}: engine {settings.engine} has no form '{form}'; name another judge, "
                    "such as a language model"
                )

    def _check_order(self, where: str, name: str, read: str) -> None:
        order = list(self.stages)
        if order.index(read) < order.index(name):
            return
        if cycle := self._path(read, name, set()):
            raise Permanent(
                f"{self.where}: a cycle: {' → '.join([name, *cycle])}; remove one of these reads"
            )
        raise Permanent(f"{where} '{read}', which comes later; move '{read}' above '{name}'")

    def _path(self, start: str, goal: str, seen: set[str]) -> list[str] | None:
        """Returns the chain of reads from one stage to another, if there is one."""
        if start == goal:
            return [start]
        if start in seen or start not in self.stages:
            return None
        seen.add(start)
        for ref in _named(self.stages[start], Reads):
            for source in _named(self.settings[ref], WEIGHTS) if ref in self.settings else [ref]:
                if rest := self._path(source, goal, seen):
                    return [start, *rest]
        return None

    def _model(self, name: str) -> RecipeModel:
        if stage := self.stages.get(name):
            # A trained model has the settings of the model that it was trained from.
            start = self._model(self._start(stage))
            settings = start.settings.model_copy(update={"demonstrations": None, "questions": None})
            return RecipeModel(name, settings, {"weights": Weights(start.main.origin, name)}, {})
        settings = self.settings[name]
        weights = {
            f: self._weights(v) for f, _, values in marked(settings, WEIGHTS) for v in values
        }
        files = {f: self.locate(v) for f, _, values in marked(settings, FILE) for v in values}
        return RecipeModel(name, settings, weights, files)

    def _start(self, stage: Stage) -> str:
        [[start]] = [refs for _, mark, refs in marked(stage, Reads) if mark.what == "weights"]
        return start

    def _weights(self, value: str) -> Weights:
        if stage := self.stages.get(value):
            return Weights(self._model(self._start(stage)).main.origin, value)
        beside = self.locate(value)
        return Weights(str(beside.absolute()) if beside.is_dir() else value)


def _named(settings: ModelSettings | Stage, mark: type[Reads] | str) -> list[str]:
    return [value for _, _, values in marked(settings, mark) for value in values]
