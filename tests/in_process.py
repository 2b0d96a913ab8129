"""Runs stages in this process, without Ray or real engines, for cheap tests."""

import asyncio
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zephyr_ray.engines.model import Model
from zephyr_ray.errors import RowError
from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import Message, plain
from zephyr_ray.models.contract import Reply
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import Artifact, read_jsonl, write_rows


class Scripted:
    """A model that returns the given answers in order, and records its requests."""

    def __init__(self, *answers: str | Reply):
        self._answers = iter(answers)
        self.requests: list[tuple[list[Message], int, bool]] = []
        self.temperatures: list[float | None] = []

    async def __call__(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        with_demonstrations: bool = True,
        schema: dict[str, Any] | None = None,
        temperature: float | None = None,
        top_logprobs: int = 0,
    ) -> Reply:
        self.requests.append((plain(messages), max_tokens, with_demonstrations))
        self.temperatures.append(temperature)
        answer = next(self._answers)
        return answer if isinstance(answer, Reply) else Reply(answer, "stop", 5, 3)


def work_on(folder: Path, **inputs: list[dict[str, Any]]) -> Work:
    """Returns a stage's `Work`; `inputs` are the rows of its input artifacts by stage name."""
    artifacts = {}
    for name, rows in inputs.items():
        (folder / name).mkdir()
        write_rows(folder / name, rows)
        artifacts[name] = Artifact(folder / name, Manifest(kind="text", key=name, files={}))
    (folder / "artifact").mkdir()
    return Work("stage", folder / "artifact", 0, artifacts, {}, {})


def run(stage: Stage, work: Work) -> list[dict[str, Any]]:
    """Runs the stage and returns the rows of its artifact."""
    stage.run(work)
    return list(read_jsonl(work.folder / "rows.jsonl"))


def run_here(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, engine: Any = None
) -> list[RowError]:
    """Replaces the module's `run_rows`. Rows run in order, on the models' own engines or on
    `engine`, whose `ask_for(model, row)` gives each row its `ask`; failed rows are left out.
    Returns a list to which the replacement appends the faults of unusable results."""
    faults: list[RowError] = []

    def run_rows(
        work: Work, rows: list[dict[str, Any]], program: Any, models: list[Model], flaw: Any = None
    ) -> list[dict[str, Any]]:
        engines = {m.name: (m, engine or m.settings.start(work.seed)) for m in models}

        async def all_rows() -> list[dict[str, Any]]:
            finished = []
            for row in rows:
                model, started_engine = engines[row.get("member", models[0].name)]
                with suppress(RowError):
                    finished.append(dict(await program(row, started_engine.ask_for(model, row))))
            return finished

        results = asyncio.run(all_rows())
        faults.extend(filter(None, map(flaw, results)) if flaw else ())
        return results

    monkeypatch.setattr(module, "run_rows", run_rows)
    return faults
