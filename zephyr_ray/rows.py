"""Runs a row program over rows on Ray Data: one conversation a row, many rows in flight.

A row program is an async function `program(row, ask) -> row`. Every finished row is appended to a
journal at once, so a killed actor or a killed driver costs the rows in flight and no answered one.
(Ray Data's own checkpoints save whole blocks at a write; a row here is dear, and is saved alone.)
"""

import asyncio
import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from zephyr_ray.engines.base import Model, ModelSpec
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.models.contract import (
    Engine,
    EngineDead,
    Message,
    Reply,
    Sampling,
    StopRun,
    demonstration_messages,
)
from zephyr_ray.models.judging import Judge, ModelJudge
from zephyr_ray.models.rules import RulesJudge
from zephyr_ray.ray_cluster import connect
from zephyr_ray.stage import Work, log
from zephyr_ray.store import Journal

Row = dict[str, Any]
Program = Callable[[Row, Any], Awaitable[Row]]

BLOCKS_PER_ACTOR = 4
"""Small blocks keep actors evenly busy; two at a time on an actor leave no gap between them."""
ENGINE_DEATHS = 5
"""Restarts of one actor after which the stage gives up."""
ROW_DEATHS = 3
"""Deaths of an engine that a row was in flight at, after which the row is failed."""


def run_rows(
    work: Work, rows: list[Row], program: Program, models: list[Model], judge: bool = False
) -> list[Row]:
    """The program's results, in the order of `rows`; failed rows are counted and left out.

    Each row has an "id"; a row answered by one model of several names it in "member". With
    `judge`, the program is given a `Judge` in place of `ask`. Raises Permanent when no row
    succeeds or a model cannot be used at all.
    """
    journal = work.journal("rows")
    results: dict[str, Row] = {}
    failed: dict[str, str] = {}
    for entry in journal.new():
        _note(entry, results, failed)
    # A row that failed for a passing reason is asked again by a new attempt.
    for row_id in [i for i, error in failed.items() if error.startswith(TEMPORARY)]:
        del failed[row_id]
    progress = work.progress
    # A stage may come here more than once: rows of its earlier passes are not resumed ones.
    progress.resumed += len(results) + len(failed) - progress.done
    progress.total = max(progress.total, len(rows))
    by_engine: dict[str, list[Model]] = {}
    for model in models:
        by_engine.setdefault(_engine_key(model), []).append(model)
    first = models[0].name
    for members in by_engine.values():
        names, known = {m.name for m in members}, results.keys() | failed.keys()
        left = [r for r in rows if r.get("member", first) in names and r["id"] not in known]
        if left:
            _execute(work, journal, left, program, members, judge, results, failed)
    if lost := [r["id"] for r in rows if r["id"] not in results and r["id"] not in failed]:
        raise Permanent(
            f"{len(lost)} rows left neither a result nor a reason (the first: {lost[0]}); "
            "finished rows are kept, run again to go on"
        )
    passing = [e for e in failed.values() if e.startswith(TEMPORARY)]
    if passing:
        raise Permanent(
            f"{len(passing)} rows failed for a passing reason ({passing[0][len(TEMPORARY) :]}); "
            "finished rows are kept, run again to ask these once more"
        )
    progress.done = len(results) + len(failed)
    work.counts["failed/rows"] = len(failed)
    if failed:
        work.examples["failed/rows"] = [f"{i}: {e}" for i, e in list(failed.items())[:3]]
    wanted = [results[r["id"]] for r in rows if r["id"] in results]
    if rows and not wanted:
        raise Permanent(f"every row failed; the first: {next(iter(failed.values()))}")
    return wanted


TEMPORARY = "temporary: "


def _passing(entry: Row) -> bool:
    return str(entry.get("error", "")).startswith(TEMPORARY)


def _note(entry: Row, results: dict[str, Row], failed: dict[str, str]) -> None:
    if "id" not in entry:
        return
    if "row" in entry:
        results.setdefault(entry["id"], entry["row"])
        failed.pop(entry["id"], None)
    elif entry["id"] not in results:
        failed[entry["id"]] = entry["error"]


def _engine_key(model: Model) -> str:
    spec = model.spec
    return json.dumps([spec.engine, model.weights, spec.model, spec.base_url, spec.context])


def _execute(
    work: Work,
    journal: Journal,
    rows: list[Row],
    program: Program,
    members: list[Model],
    judge: bool,
    results: dict[str, Row],
    failed: dict[str, str],
) -> None:
    """One Ray Data pass over rows that share an engine; fills `results` and `failed`."""
    import ray
    from ray.data import ActorPoolStrategy

    connect()

    spec = members[0].spec
    actors = min(spec.actors, len(rows), _room(spec))
    blocks = min(len(rows), actors * BLOCKS_PER_ACTOR)
    dataset = ray.data.from_items(
        [{"row": json.dumps(row)} for row in rows], override_num_blocks=blocks
    ).map_batches(
        RowActor,
        fn_constructor_kwargs={
            "program": program,
            "members": {m.name: m for m in members},
            "judge": judge,
            "seed": work.seed,
            "journal": str(journal.folder),
        },
        batch_size=None,
        compute=ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=2),
        num_cpus=1,
        num_gpus=spec.gpus,
        max_restarts=ENGINE_DEATHS,
        # Of a lost node Ray notices late: tries until then must not count.
        max_task_retries=-1,
    )
    stop: list[str] = []
    done = threading.Event()
    before = work.progress.done or work.progress.resumed

    def follow() -> None:
        while True:
            last = done.is_set()
            for entry in journal.new():
                _note(entry, results, failed)
                stop.extend([entry["stop"]] if "stop" in entry else [])
            work.progress.done = max(before, len(results) + len(failed))
            if last:
                return
            done.wait(0.5)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        for _ in dataset.iter_batches(batch_size=None):
            pass
    except ray.exceptions.RayError as error:
        log.debug("row pass failed", exc_info=True)
        raise Permanent(
            f"the actors of model '{members[0].name}' died {ENGINE_DEATHS + 1} times "
            f"({str(error).strip().splitlines()[-1]}); finished rows are kept, run again to go on"
        ) from error
    finally:
        done.set()
        follower.join()
    if stop:
        raise Permanent(stop[0])


def _room(spec: ModelSpec) -> int:
    """How many actors the cluster can hold at once, at least one."""
    import ray

    total = ray.cluster_resources()
    room = int(total.get("CPU", 1))
    return max(1, min(room, int(total.get("GPU", 0) / spec.gpus)) if spec.gpus else room)


class RowActor:
    """One process with one engine. Ray Data calls it with blocks of rows, as JSON."""

    def __init__(
        self, program: Program, members: dict[str, Model], judge: bool, seed: int, journal: str
    ):
        self._program, self._members, self._judge = program, members, judge
        self._folder = Path(journal)
        self._journal = Journal(self._folder, writer=uuid.uuid4().hex[:12])
        self._stopped = False
        self._engine: Engine | Judge | None = None
        try:
            self._engine = start_engine(next(iter(members.values())), seed)
        except Permanent as error:
            self._stop(str(error))
        spec = next(iter(members.values())).spec
        self._slots, self._alone = asyncio.Semaphore(spec.concurrency), asyncio.Lock()
        self._flying: set[str] = set()

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # A retried block may have rows that were answered before the actor died.
        entries = list(Journal(self._folder).new())
        ended = {e["id"] for e in entries if "id" in e and not _passing(e)}
        deaths = Counter(i for e in entries for i in e.get("died", []))
        rows = [json.loads(text) for text in batch["row"]]
        left = [row for row in rows if row["id"] not in ended]
        await asyncio.gather(*(self._one(row) for row in left if not deaths[row["id"]]))
        # Rows that an engine died on go alone, so that soon only the one to blame has died often.
        for row in left:
            if deaths[row["id"]] >= ROW_DEATHS:
                error = f"the engine died {ROW_DEATHS} times at this row"
                self._journal.append({"id": row["id"], "error": error})
            elif deaths[row["id"]]:
                async with self._alone:
                    await self._one(row)
        return {"id": [row["id"] for row in rows]}

    async def _one(self, row: Row) -> None:
        async with self._slots:
            if self._stopped:
                return
            self._flying.add(row["id"])
            try:
                result = await self._program(row, self._tool(row))
                self._journal.append({"id": row["id"], "row": result})
            except StopRun as error:
                self._stop(str(error))
            except EngineDead as error:
                log.error("the engine died: %s", error)
                self._journal.append({"died": sorted(self._flying)})
                os._exit(1)  # Ray starts the actor again and retries its blocks
            except Temporary as error:
                self._journal.append({"id": row["id"], "error": f"{TEMPORARY}{error}"})
            except Permanent as error:
                self._journal.append({"id": row["id"], "error": str(error)})
            except Exception as error:
                log.warning("row %s failed", row["id"], exc_info=True)
                self._journal.append({"id": row["id"], "error": f"{type(error).__name__}: {error}"})
            finally:
                self._flying.discard(row["id"])

    def _stop(self, message: str) -> None:
        self._stopped = True
        self._journal.append({"stop": message})

    def _tool(self, row: Row) -> Any:
        assert self._engine is not None
        model = (
            self._members[row["member"]] if "member" in row else next(iter(self._members.values()))
        )
        if self._judge:
            return judge_of(self._engine, model, row)
        assert isinstance(self._engine, Engine)
        return RowAsk(self._engine, model, row)


class RowAsk:
    """`ask` of one row: its model's sampling, and its demonstrations of the row's constraint."""

    def __init__(self, engine: Engine, model: Model, row: Row):
        self._engine, self._spec = engine, model.spec
        kind = (row.get("constraint") or {}).get("kind")
        self._shown = demonstration_messages(model.demonstrations, kind)

    async def __call__(
        self, messages: list[Message], *, max_tokens: int, shown: bool = True
    ) -> Reply:
        sampling = Sampling(self._spec.temperature, self._spec.top_p, max_tokens)
        system = [m for m in messages if m["role"] == "system"]
        rest = [m for m in messages if m["role"] != "system"]
        examples = self._shown if shown else []
        return await self._engine.answer([*system, *examples, *rest], sampling)


def judge_of(engine: Engine | Judge, model: Model, row: Row) -> Judge:
    """The judge that an engine is, or that its model plays."""
    return ModelJudge(RowAsk(engine, model, row)) if isinstance(engine, Engine) else engine


def start_engine(model: Model, seed: int) -> Engine | Judge:
    """Starts the engine of a model in this process."""
    began = time.monotonic()
    engine: Engine | Judge
    if model.spec.engine == "rules":
        engine = RulesJudge(model.spec)
    elif model.spec.engine in ("openai", "service"):
        from zephyr_ray.models.openai import OpenAIEngine, ServedJudge

        kind = OpenAIEngine if model.spec.engine == "openai" else ServedJudge
        engine = kind(model.spec)
    else:
        from zephyr_ray.models.vllm import VllmEngine

        engine = VllmEngine(model.weights, model.spec.context, model.spec.gpus > 0, seed)
    log.info("engine of '%s' ready after %.0f s", model.name, time.monotonic() - began)
    return engine
