"""Runs a row program over rows on Ray Data: one conversation per row, many rows in flight.

A row program is an async function `program(row, ask) -> row`. Every finished row is appended to a
journal at once, so a killed actor or driver costs the rows in flight and no answered one. (Ray
Data's own checkpoints save a block at a time; here a single row is expensive, and is saved alone.)
"""

import json
import threading
from dataclasses import dataclass, field

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.outcomes import Answered, RowFault, Stopped, WorldFault, read
from zephyr_ray.ray_cluster import connect
from zephyr_ray.row_actor import Program, Row, RowActor
from zephyr_ray.stage import Work, log
from zephyr_ray.store import Journal

BLOCKS_PER_ACTOR = 4
"""Small blocks keep actors evenly busy; two at a time on an actor leave no gap between them."""
ENGINE_DEATHS = 5
"""Restarts of one actor after which the stage gives up."""


def run_rows(work: Work, rows: list[Row], program: Program, models: list[Model]) -> list[Row]:
    """Returns the program's results in the order of `rows`; failed rows are counted and left out.

    Each row has an "id"; a row answered by one model of several names it in "member". Raises
    Permanent if no row succeeds, if a row could not be asked, or if a model cannot be used at all.
    """
    ends = _Ends(work.journal("rows"))
    ends.follow()
    # What stopped an earlier attempt is tried again by this one.
    ends.world_faults.clear()
    ends.stops.clear()
    progress = work.progress
    # A stage may come here more than once: rows of its earlier passes are not resumed ones.
    progress.resumed += ends.count - progress.done
    progress.total = max(progress.total, len(rows))
    by_engine: dict[str, list[Model]] = {}
    for model in models:
        by_engine.setdefault(model.settings.process_identity(), []).append(model)
    first = models[0].name
    for members in by_engine.values():
        names = {m.name for m in members}
        left = [r for r in rows if r.get("member", first) in names and not ends.has(r["id"])]
        if left:
            _execute(work, ends, left, program, members)
    if lost := [
        r["id"] for r in rows if not ends.has(r["id"]) and r["id"] not in ends.world_faults
    ]:
        raise Permanent(
            f"{len(lost)} rows left neither a result nor a reason (the first: {lost[0]}); "
            "finished rows are kept, run again to continue"
        )
    if ends.world_faults:
        row_id, reason = next(iter(ends.world_faults.items()))
        raise Permanent(
            f"{len(ends.world_faults)} rows were not answered (row '{row_id}': {reason}); finished "
            "rows are kept, run again to ask these once more"
        )
    progress.done = ends.count
    work.counts["failed/rows"] = len(ends.row_faults)
    if ends.row_faults:
        faults = list(ends.row_faults.items())[:3]
        work.examples["failed/rows"] = [f"{row_id}: {reason}" for row_id, reason in faults]
    results = [ends.results[r["id"]] for r in rows if r["id"] in ends.results]
    if rows and not results:
        raise Permanent(f"every row failed; the first: {next(iter(ends.row_faults.values()))}")
    return results


@dataclass
class _Ends:
    """How the rows have ended so far, read from the journal."""

    journal: Journal
    results: dict[str, Row] = field(default_factory=dict)
    row_faults: dict[str, str] = field(default_factory=dict)
    world_faults: dict[str, str] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.results) + len(self.row_faults)

    def has(self, row_id: str) -> bool:
        return row_id in self.results or row_id in self.row_faults

    def follow(self) -> None:
        """Reads what has been appended since the last call."""
        for line in self.journal.new():
            match read(line):
                case Answered(row_id, row):
                    self.results.setdefault(row_id, row)
                    self.row_faults.pop(row_id, None)
                    self.world_faults.pop(row_id, None)
                case RowFault(row_id, reason) if row_id not in self.results:
                    self.row_faults[row_id] = reason
                    self.world_faults.pop(row_id, None)
                case WorldFault(row_id, reason) if not self.has(row_id):
                    self.world_faults[row_id] = reason
                case Stopped(reason):
                    self.stops.append(reason)


def _execute(
    work: Work, ends: _Ends, rows: list[Row], program: Program, members: list[Model]
) -> None:
    """Makes one Ray Data pass over rows that share an engine; `ends` follows it."""
    import ray
    from ray.data import ActorPoolStrategy

    connect()
    settings = members[0].settings
    actors = min(settings.actors, len(rows), _room(settings))
    blocks = min(len(rows), actors * BLOCKS_PER_ACTOR)
    dataset = ray.data.from_items(
        [{"row": json.dumps(row)} for row in rows], override_num_blocks=blocks
    ).map_batches(
        RowActor,
        fn_constructor_kwargs={
            "program": program,
            "members": {m.name: m for m in members},
            "seed": work.seed,
            "journal": str(ends.journal.folder),
        },
        batch_size=None,
        compute=ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=2),
        num_cpus=1,
        num_gpus=settings.gpus_per_actor,
        max_restarts=ENGINE_DEATHS,
        # Ray detects a lost node late; retries before that must not count.
        max_task_retries=-1,
    )
    done = threading.Event()
    before = work.progress.done or work.progress.resumed

    def follow() -> None:
        while True:
            last = done.is_set()
            ends.follow()
            work.progress.done = max(before, ends.count)
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
            f"({str(error).strip().splitlines()[-1]}); "
            "finished rows are kept, run again to continue"
        ) from error
    finally:
        done.set()
        follower.join()
    if ends.stops:
        raise Permanent(ends.stops[0])


def _room(settings: ModelSettings) -> int:
    """Returns how many actors the cluster can hold at once, at least one."""
    import ray

    total, gpus = ray.cluster_resources(), settings.gpus_per_actor
    room = int(total.get("CPU", 1))
    return max(1, min(room, int(total.get("GPU", 0) / gpus)) if gpus else room)
