"""Runs row programs in this process, without Ray: what a cheap test of a stage needs."""

import asyncio
from types import ModuleType
from typing import Any

import pytest

from zephyr_ray.engines.model import Model
from zephyr_ray.stage import Work


def run_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType, engine: Any = None) -> None:
    """Replaces the module's `run_rows`. Rows are asked in order, of the models' own engines, or of
    `engine`, which gives each row its `ask_for(model, row)`."""

    def run_rows(
        work: Work, rows: list[dict[str, Any]], program: Any, models: list[Model]
    ) -> list[dict[str, Any]]:
        started = {m.name: (m, engine or m.settings.start(work.seed)) for m in models}

        async def one(row: dict[str, Any]) -> dict[str, Any]:
            model, answering = started[row.get("member", models[0].name)]
            return dict(await program(row, answering.ask_for(model, row)))

        async def every() -> list[dict[str, Any]]:
            return [await one(row) for row in rows]

        return asyncio.run(every())

    monkeypatch.setattr(module, "run_rows", run_rows)
