"""Runs row programs in this process, without Ray, for cheap tests of stages."""

import asyncio
from types import ModuleType
from typing import Any

import pytest

from zephyr_ray.engines.model import Model
from zephyr_ray.stage import Work


def run_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType, engine: Any = None) -> None:
    """Replaces the module's `run_rows`. Rows run in order, on the models' own engines or on
    `engine`, whose `ask_for(model, row)` gives each row its `ask`."""

    def run_rows(
        work: Work, rows: list[dict[str, Any]], program: Any, models: list[Model]
    ) -> list[dict[str, Any]]:
        engines = {m.name: (m, engine or m.settings.start(work.seed)) for m in models}

        async def one(row: dict[str, Any]) -> dict[str, Any]:
            model, started_engine = engines[row.get("member", models[0].name)]
            return dict(await program(row, started_engine.ask_for(model, row)))

        async def all_rows() -> list[dict[str, Any]]:
            return [await one(row) for row in rows]

        return asyncio.run(all_rows())

    monkeypatch.setattr(module, "run_rows", run_rows)
