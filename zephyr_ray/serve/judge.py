"""Serves the evaluation's judge as a deployment, with the same engine, questions and judgements."""

from typing import Any

from zephyr_ray.engines.model import Model
from zephyr_ray.errors import Permanent


class NoForm(Permanent):
    """A request for a form that the judge does not have."""


class JudgeService:
    """Judges answers in a form of `judges.FORMS`, many concurrently."""

    def __init__(self, model: Model):
        self._model, self._engine = model, model.settings.start(seed=0)

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Raises NoForm if the judge does not have the form."""
        if not self._model.settings.judges(form):
            engine = self._model.settings.engine
            raise NoForm(f"its engine {engine} has no form '{form}'; serve another judge")
        return await self._engine.ask_for(self._model, row).judge(form, row, answers)
