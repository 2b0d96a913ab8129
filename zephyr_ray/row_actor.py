"""Runs a row program on blocks of rows, in one process with one engine."""

import asyncio
import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.settings import Engine, ModelSettings
from zephyr_ray.errors import Permanent, RowError, Temporary
from zephyr_ray.formatting import duration
from zephyr_ray.models.contract import REQUESTS, STOPPING, Ask, EngineDead, StopRun
from zephyr_ray.outcomes import (
    Answered,
    EngineDied,
    EnvironmentFault,
    Notice,
    Outcome,
    RowFault,
    Stopped,
    from_entry,
    to_entry,
)
from zephyr_ray.store import Journal

log = logging.getLogger("zephyr_ray")

Row = dict[str, Any]
Program = Callable[[Row, Any], Awaitable[Row]]
Flaw = Callable[[Row], RowError | None]
"""Returns the fault of a useless result, such as an empty answer; None if the result is usable."""

ROW_DEATHS = 3
"""Leave a row to the next attempt after this many engine crashes while it was in flight. The row
is not dropped, because a broken GPU crashes the engine whatever the row."""
FAULTS_IN_SUCCESSION = 3
"""Stop after this many environment faults without an answer between them."""


def start_engine(settings: ModelSettings, seed: int) -> Engine:
    """Returns an engine for one pass."""
    return settings.start(seed)


def no_flaw(row: Row) -> RowError | None:
    """Returns None: every result is usable."""
    return None


class RowActor:
    """Runs blocks of JSON rows of one pass. Writes one outcome per row to the journal; stops once
    more than `max_failed` rows of the stage failed."""

    def __init__(
        self,
        program: Program,
        members: dict[str, Model],
        seed: int,
        journal: str,
        max_failed: int,
        failed: Collection[str] = (),
        since: dict[Path, int] | None = None,
        flaw: Flaw = no_flaw,
        useless: Mapping[str, int] | None = None,
        start: Callable[[ModelSettings, int], Engine] = start_engine,
    ):
        """`failed` are rows that failed in earlier attempts, and `useless` the number of useless
        results so far by row; `since` is the journal's position at the start of this
        attempt. `start` returns an engine, new or running."""
        self._program, self._members, self._max_failed = program, members, max_failed
        self._flaw, self._useless = flaw, useless or {}
        self._failed, self._finished, self._deaths = set(failed), set[str](), Counter[str]()
        self._faults_since_answer = 0
        self._journal = Journal(Path(journal), writer=uuid.uuid4().hex[:12], since=since)
        self._stopped = asyncio.Event()
        self._notices = _Notices(self._write)
        log.addHandler(self._notices)
        first = next(iter(members.values()))
        try:
            begin = time.monotonic()
            self._engine = start(first.settings, seed)
            log.info(
                "engine of '%s' ready after %s", first.name, duration(time.monotonic() - begin)
            )
        except Permanent as error:
            self._stop(str(error))
        except Exception as error:
            log.warning("the engine of '%s' did not start", first.name, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            self._stop(f"the engine of model '{first.name}' did not start: {reason}")
        self._max_rows = first.settings.rows_in_flight
        self._row_slots, self._alone = asyncio.Semaphore(self._max_rows), asyncio.Lock()
        self._requests = asyncio.Semaphore(first.settings.concurrency)
        self._in_flight: set[str] = set()

    def close(self) -> None:
        """Stops sending warnings to this pass."""
        log.removeHandler(self._notices)
        del self._notices  # breaks a reference cycle, which gc skips once frozen

    async def __call__(self, batch: dict[str, Any]) -> None:
        for model in self._members.values():
            if model.answers:
                model.answers.refresh()
        # In a retried block, rows may have been answered before an actor died.
        for entry in self._journal.read_new(of_others=True):
            self._note(from_entry(entry))
        rows = [json.loads(text) for text in batch["row"]]
        pending = [row for row in rows if row["id"] not in self._finished]
        # Other blocks may read about more crashes while this one runs.
        deaths = {row["id"]: self._deaths[row["id"]] for row in pending}
        await self._run_all([row for row in pending if not deaths[row["id"]]])
        # One at a time, so that only rows that crash the engine themselves reach ROW_DEATHS.
        for row in pending:
            if deaths[row["id"]] >= ROW_DEATHS:
                reason = f"the engine died {ROW_DEATHS} times while this row was in flight"
                self._leave(row, reason)
            elif deaths[row["id"]]:
                async with self._alone:
                    await self._run_all([row])
        # The driver, perhaps on another machine, reads a pass's outcomes after the last block.
        await asyncio.to_thread(self._journal.sync)

    async def _run_all(self, rows: list[Row]) -> None:
        """Runs the program on rows, at most `rows_in_flight` of all blocks at once."""
        waiting = iter(rows)

        async def run_next() -> None:
            async with self._row_slots:
                # One task for many rows: starting the next row takes no turn of the event loop.
                for row in waiting:
                    if not self._stopped.is_set():
                        await self._run(row)

        await asyncio.gather(*(run_next() for _ in range(min(len(rows), self._max_rows))))

    async def _run(self, row: Row) -> None:
        """Runs the program on a row and writes its outcome; ends the process if the engine died."""
        self._in_flight.add(row["id"])
        STOPPING.set(self._stopped)
        REQUESTS.set(self._requests)
        try:
            result = await self._program(row, self._ask_for(row))
            self._write(Answered(row["id"], result))
            self._faults_since_answer = 0
            if self._flaw(result):
                self._count_failed(row["id"])
        except RowError as error:
            self._write(RowFault(row["id"], str(error), error.cause))
            self._count_failed(row["id"])
        except StopRun as error:
            self._stop(str(error))
        except Permanent as error:
            self._stop(f"row '{row['id']}': {error}")
        except EngineDead as error:
            log.error("the engine died: %s", error)
            self._write(EngineDied(sorted(self._in_flight)))
            os._exit(1)  # Ray restarts the process and retries its blocks
        except Temporary as error:
            self._leave(row, str(error))
        except Exception as error:
            # Unexpected, so more likely our bug than the row's fault: the row must not be lost.
            log.warning("row %s failed", row["id"], exc_info=True)
            self._leave(row, f"{type(error).__name__}: {error}")
        finally:
            self._in_flight.discard(row["id"])

    def _write(self, outcome: Outcome) -> None:
        self._journal.append(to_entry(outcome))
        self._note(outcome)

    def _note(self, outcome: Outcome | None) -> None:
        """Remembers which rows are finished or failed, and which were in flight at a crash."""
        match outcome:
            case Answered(row_id):
                self._finished.add(row_id)
            case RowFault(row_id):
                self._finished.add(row_id)
                self._failed.add(row_id)
            case EngineDied(row_ids):
                self._deaths.update(row_ids)

    def _count_failed(self, row_id: str) -> None:
        """Stops if too many rows failed, which `run_rows` reports."""
        self._failed.add(row_id)
        if len(self._failed) > self._max_failed:
            self._stopped.set()

    def _leave(self, row: Row, reason: str) -> None:
        """Leaves a row to the next run; stops after FAULTS_IN_SUCCESSION without an answer."""
        self._write(EnvironmentFault(row["id"], reason))
        self._faults_since_answer += 1
        if self._faults_since_answer == FAULTS_IN_SUCCESSION:
            self._stop(
                f"{FAULTS_IN_SUCCESSION} rows in succession were not answered; the last: {reason}; "
                "correct that, then run again"
            )

    def _stop(self, message: str) -> None:
        """Starts no further row and retries no request. Requests in flight continue, because their
        answers are paid for."""
        if not self._stopped.is_set():
            self._write(Stopped(message))
        self._stopped.set()

    def _ask_for(self, row: Row) -> Ask:
        """Returns the row's `ask`. With several models, the row names its own in "member"."""
        name = row.get("member") or next(iter(self._members))
        if number := self._useless.get(row["id"]):
            # Otherwise the answer log would return the useless answer again.
            row = {**row, "sample": [row.get("sample", row["id"]), f"retry {number}"]}
        return self._engine.ask_for(self._members[name], row)


class _Notices(logging.Handler):
    """A log handler that sends warnings to the console. Omits records with a traceback; the
    outcome of their row gives the reason."""

    def __init__(self, write: Callable[[Outcome], None]):
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == log.name and not record.exc_info:
            self._write(Notice(record.getMessage()))
