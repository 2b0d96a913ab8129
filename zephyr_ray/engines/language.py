"""Defines what engines of language models share: sampling settings, and the `ask` of one row."""

from itertools import takewhile
from typing import Annotated, Any, ClassVar

from pydantic import Field

from zephyr_ray.engines import demonstrations
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.judges import FORMS
from zephyr_ray.messages import Message, plain
from zephyr_ray.models.contract import Reply, Sampling
from zephyr_ray.models.shapes import Shape
from zephyr_ray.settings import FILE


class LanguageSettings(ModelSettings):
    """Settings shared by all engines that answer prompts."""

    uses: ClassVar[frozenset[str]] = frozenset({"model", "judge"})

    temperature: float = Field(0.7, ge=0)
    """The paper samples for evaluation at temperature 0.7, top-p 0.95 (arXiv 2310.16944)."""
    top_p: float = Field(0.95, gt=0, le=1)
    demonstrations: Annotated[str | None, FILE] = None
    """JSONL of worked examples, shown before prompts with the same kind of constraint."""
    context: int = Field(2048, ge=16)
    """Maximum tokens of prompt and answer together; a row that needs more fails."""

    def limit(self, shape: Shape | None) -> int | None:
        # An endpoint has a limit of its own, which the default does not state.
        return self.context if "context" in self.model_fields_set else None


class LanguageEngine:
    """A running language model. Subclasses answer single requests."""

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        """Returns the answer. Raises RowError, StopRun or Temporary as `Ask` does."""
        raise NotImplementedError

    def ask_for(self, model: Model, row: dict[str, Any]) -> "RowAsk":
        return RowAsk(self, model, row)


class RowAsk:
    """The `ask` of one row: applies its model's sampling settings and demonstrations."""

    def __init__(self, engine: LanguageEngine, model: Model, row: dict[str, Any]):
        assert isinstance(model.settings, LanguageSettings)
        self._engine, self._settings = engine, model.settings
        kind = (row.get("constraint") or {}).get("kind")
        self._demonstrations = demonstrations.turns(model.demonstrations, kind)

    async def __call__(
        self, messages: list[Message], *, max_tokens: int, with_demonstrations: bool = True
    ) -> Reply:
        sampling = Sampling(self._settings.temperature, self._settings.top_p, max_tokens)
        system = list(takewhile(lambda m: m["role"] == "system", messages))
        examples = self._demonstrations if with_demonstrations else []
        turns = [*system, *examples, *messages[len(system) :]]
        return await self._engine.answer(plain(turns), sampling)

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return await FORMS[form].judge(row, answers, self)
