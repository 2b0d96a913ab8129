"""The judge of the evaluation as a deployment: the same engine, questions and verdicts."""

from typing import Any

from zephyr_ray.engines.base import Model
from zephyr_ray.models.judging import Judge
from zephyr_ray.rows import judge_of, start_engine


class JudgeService:
    """Rows in, verdicts out, as `models.judging.Judge` says; many at a time."""

    def __init__(self, model: Model):
        self._model, self._engine = model, start_engine(model, seed=0)

    def _judge(self, row: dict[str, Any]) -> Judge:
        return judge_of(self._engine, self._model, row)

    async def compare(
        self, row: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
    ) -> dict[str, Any]:
        return await self._judge(row).compare(row, first, second)

    async def score(self, row: dict[str, Any], completion: dict[str, Any]) -> dict[str, Any]:
        return await self._judge(row).score(row, completion)
