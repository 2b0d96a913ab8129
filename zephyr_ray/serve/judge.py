"""Serves the evaluation's judge as a deployment: same engine, questions and judgements."""

from typing import Any

from zephyr_ray.engines.model import Model


class JudgeService:
    """Judges answers by a form of `judges.FORMS`; many at a time."""

    def __init__(self, model: Model):
        self._model, self._engine = model, model.settings.start(seed=0)

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return await self._engine.ask_for(self._model, row).judge(form, row, answers)
