"""Starts the governor of requests to models with limits or prices, and shows the cost of a run."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zephyr_ray.engines.governor import Governor
from zephyr_ray.engines.ledger import PAID, Spent, ledger_folder
from zephyr_ray.engines.meter import Meter
from zephyr_ray.formatting import dollars
from zephyr_ray.plan import Step
from zephyr_ray.recipe import Recipe
from zephyr_ray.stage import Progress

CALLS_AT_ONCE = 10_000
"""Maximum concurrent calls to the governor: more than actors times models, because settlements must
not queue behind the reservations waiting for them."""
LOOK_SECONDS, LOG_SECONDS = 1.0, 10.0
"""Minimum seconds between two queries of the cost, and between two entries in MLflow."""
REPLY_SECONDS, LAST_REPLY_SECONDS = 5.0, 300.0
"""Maximum seconds to wait for the governor's figures, while a stage runs and at its end, where a
finished stage must not fail because the governor is being restarted."""


class Spending:
    """The spending of a run. If no model has limits or a price, there is no governor."""

    def __init__(self, recipe: Recipe, storage: Path, steps: list[Step]):
        """Starts the governor for the steps that are still to run."""
        self._budget, self._governor = recipe.budget_usd, None
        self._tariffs = {
            name: tariff
            for step in steps
            if step.must_run
            for name, model in recipe.models_read(step.stage).items()
            if (tariff := model.settings.tariff())
        }
        if self._tariffs:
            import ray

            actor = ray.remote(Governor).options(
                num_cpus=0, max_concurrency=CALLS_AT_ONCE, max_restarts=-1, max_task_retries=-1
            )
            folder = ledger_folder(storage, recipe.name)
            run = uuid.uuid4().hex[:12]
            self._governor = actor.remote(folder, run, self._tariffs, recipe.budget_usd)

    def meter(self, stage: str, model: str) -> Meter | None:
        """Returns the meter of a model's requests; None if it has neither limits nor a price."""
        return Meter(self._governor, stage, model) if model in self._tariffs else None

    def stage_spending(
        self, stage: str, progress: Progress, log: Callable[[dict[str, float], int], None]
    ) -> "StageSpending":
        return StageSpending(self._governor, self._budget, stage, progress, log)


class StageSpending:
    """The spending of a running stage; `stage` is the name of its artifact's folder."""

    def __init__(
        self,
        governor: Any,
        budget: float | None,
        stage: str,
        progress: Progress,
        log: Callable[[dict[str, float], int], None],
    ):
        self._governor, self._budget, self._stage = governor, budget, stage
        self._progress, self._log = progress, log
        self._looked = self._logged = 0.0
        self._before: float | None = None
        """Dollars that earlier runs spent on the stage."""

    def tick(self, end: bool = False) -> None:
        """Updates the progress line, and MLflow if that is due or the stage ends."""
        from ray.exceptions import RayError

        now = time.monotonic()
        if not self._governor or not (end or now > self._looked + LOOK_SECONDS):
            return
        self._looked = now
        try:
            figures = (self._figures(of, REPLY_SECONDS) for of in (None, self._stage))
            total, stage = map(_max_dollars, figures)
        except RayError:  # the governor is being restarted
            return
        if self._before is None:
            self._before = stage
        metrics = {"spent_usd": total, "stage_usd": stage}
        text = f"{dollars(total)} spent"
        if self._budget is not None:
            text = f"{dollars(total)} of {dollars(self._budget)} spent"
        progress = self._progress
        if (new := progress.done - progress.resumed) > 0:
            left = (stage - self._before) / new * max(0, progress.total - progress.done)
            metrics["projected_usd"] = total + left
            text += f", {dollars(total + left)} after this stage"
        progress.note = text
        if end or now > self._logged + LOG_SECONDS:
            self._logged = now
            self._log(metrics, progress.done)

    def counts(self) -> dict[str, float]:
        """Returns the figures for the manifest, by names such as paid/<model>/requests."""
        if not self._governor:
            return {}
        return {
            f"{PAID}{model}/{name}": value
            for model, spent in self._figures(self._stage, LAST_REPLY_SECONDS).items()
            for name, value in vars(spent).items()
        }

    def _figures(self, stage: str | None, seconds: float) -> dict[str, Spent]:
        import ray

        figures: dict[str, Spent] = ray.get(self._governor.spent.remote(stage), timeout=seconds)
        return figures


def _max_dollars(figures: dict[str, Spent]) -> float:
    return sum(spent.max_dollars for spent in figures.values())
