"""One process with one engine: runs a row program on the rows that Ray Data hands it."""

import asyncio
import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from zephyr_ray.engines.model import Model
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.models.contract import Ask, EngineDead, StopRun
from zephyr_ray.outcomes import (
    Answered,
    EngineDied,
    Outcome,
    RowFault,
    Stopped,
    WorldFault,
    entry,
    read,
)
from zephyr_ray.store import Journal

log = logging.getLogger("zephyr_ray")

Row = dict[str, Any]
Program = Callable[[Row, Any], Awaitable[Row]]

ROW_DEATHS = 3
"""Fail a row after this many engine crashes while it was in flight."""


class RowActor:
    """Ray Data calls it with blocks of rows, as JSON. Outcomes go to the journal, row by row."""

    def __init__(self, program: Program, members: dict[str, Model], seed: int, journal: str):
        self._program, self._members = program, members
        self._folder = Path(journal)
        self._journal = Journal(self._folder, writer=uuid.uuid4().hex[:12])
        self._stopped = False
        first = next(iter(members.values()))
        try:
            began = time.monotonic()
            self._engine = first.settings.start(seed)
            log.info("engine of '%s' ready after %.0f s", first.name, time.monotonic() - began)
        except Permanent as error:
            self._stop(str(error))
        self._slots, self._alone = asyncio.Semaphore(first.settings.concurrency), asyncio.Lock()
        self._in_flight: set[str] = set()

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # A retried block may have rows that were answered before the actor died.
        outcomes = [read(line) for line in Journal(self._folder).new()]
        ended = {o.id for o in outcomes if isinstance(o, Answered | RowFault)}
        deaths = Counter(row for o in outcomes if isinstance(o, EngineDied) for row in o.died)
        rows = [json.loads(text) for text in batch["row"]]
        left = [row for row in rows if row["id"] not in ended]
        await asyncio.gather(*(self._one(row) for row in left if not deaths[row["id"]]))
        # Rows in flight at a crash go one at a time, so that soon only the guilty one has many.
        for row in left:
            if deaths[row["id"]] >= ROW_DEATHS:
                self._write(RowFault(row["id"], f"the engine died {ROW_DEATHS} times at this row"))
            elif deaths[row["id"]]:
                async with self._alone:
                    await self._one(row)
        return {"id": [row["id"] for row in rows]}

    async def _one(self, row: Row) -> None:
        async with self._slots:
            if self._stopped:
                return
            self._in_flight.add(row["id"])
            try:
                self._write(Answered(row["id"], await self._program(row, self._ask_for(row))))
            except StopRun as error:
                self._stop(str(error))
            except EngineDead as error:
                log.error("the engine died: %s", error)
                self._write(EngineDied(sorted(self._in_flight)))
                os._exit(1)  # Ray starts the actor again and retries its blocks
            except Temporary as error:
                self._write(WorldFault(row["id"], str(error)))
            except Permanent as error:
                self._write(RowFault(row["id"], str(error)))
            except Exception as error:
                # Unforeseen, so more likely our bug than the row's fault: never a lost row.
                log.warning("row %s failed", row["id"], exc_info=True)
                self._write(WorldFault(row["id"], f"{type(error).__name__}: {error}"))
            finally:
                self._in_flight.discard(row["id"])

    def _write(self, outcome: Outcome) -> None:
        self._journal.append(entry(outcome))

    def _stop(self, message: str) -> None:
        self._stopped = True
        self._write(Stopped(message))

    def _ask_for(self, row: Row) -> Ask:
        """Returns the row's `ask`; a row answered by one model of several names it in "member"."""
        name = row.get("member") or next(iter(self._members))
        return self._engine.ask_for(self._members[name], row)
