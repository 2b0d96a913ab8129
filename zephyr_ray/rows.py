"""Runs a row program on Ray Data, with many rows in flight.

A row program is an async function `program(row, ask) -> row`. Every finished row is appended to a
journal at once, so a killed actor or driver loses only the rows in flight. (Ray Data's checkpoints
save whole blocks, but a single row is expensive here.)
"""

import json
import logging
import math
import re
import shlex
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from zephyr_ray.engines.host import Dispatcher
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.pool import ENGINE_DEATHS, capacity
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import list_counts, percent, shorten
from zephyr_ray.outcomes import Answered, EnvironmentFault, Notice, RowFault, Stopped, from_entry
from zephyr_ray.ray_cluster import blames_memory, connect
from zephyr_ray.row_actor import Flaw, Program, Row, RowActor, no_flaw
from zephyr_ray.stage import Work, log
from zephyr_ray.store import Journal

console = logging.getLogger("zephyr_ray.rows")
"""Shows notices from actors. Their own logger is not used, because it would send them again."""
NAMED_ROWS = 5
"""Maximum rows named in an error line."""
EXCEPTION_LINE = re.compile(r"\w[\w.]*(Error|Exception): ")


def run_rows(
    work: Work, rows: list[Row], program: Program, models: list[Model], flaw: Flaw = no_flaw
) -> list[Row]:
    """Returns the program's results in the order of `rows`; failed rows are counted and omitted.

    Each row has an "id"; within a stage, rows with the same "id" are the same row. With several
    models, each row names its model in "member". Its "sample", by default its "id", distinguishes
    its requests from identical ones in the answer log. `flaw` returns the fault of an unusable
    result; such a result is returned too, but counts as failed. Raises Permanent if a row could not
    be finished because its environment failed or its model cannot be used, or if more rows failed
    than `work.max_failed` allows; the next attempt then retries the failed rows. A stage that calls
    this function again passes its earlier rows too, so that the limit applies to all rows of the
    stage.
    """
    outcomes = _Outcomes(
        work.journal("rows"), rows=len(rows), max_failed=work.allowed(len(rows)), flaw=flaw
    )
    outcomes.follow()
    outcomes.prepare_retry()
    for row in rows:
        if row["id"] in work.give_up and not outcomes.has(row["id"]):
            fault = RowFault(row["id"], f"{work.name}.give_up names it", "given up")
            outcomes.row_faults[row["id"]] = fault
    progress = work.progress
    # A stage may call this function several times; rows of its earlier calls are not resumed.
    progress.resumed += outcomes.count - progress.done
    progress.total = max(progress.total, len(rows))
    passes: dict[str, list[Model]] = {}
    for model in models:
        passes.setdefault(model.settings.pass_identity(), []).append(model)
    first = models[0].name
    for members in passes.values():
        names = {m.name for m in members}
        pending = [r for r in rows if r.get("member", first) in names and not outcomes.has(r["id"])]
        if pending:
            _execute(work, outcomes, pending, program, members)
        outcomes.check_failures(work)
    faults = outcomes.environment_faults
    if missing := [r["id"] for r in rows if not outcomes.has(r["id"]) and r["id"] not in faults]:
        raise Permanent(
            f"{len(missing)} rows have no outcome (the first: {missing[0]}); finished rows are "
            "kept, run again to continue"
        )
    if faults:
        raise Permanent(_describe_unanswered(work.name, faults))
    progress.done = outcomes.count
    return [outcomes.results[r["id"]] for r in rows if r["id"] in outcomes.results]


@dataclass
class _Outcomes:
    """The outcomes of rows so far, read from the journal."""

    journal: Journal
    rows: int = 0
    """Total number of rows."""
    max_failed: int = 0
    """Maximum number of failed rows."""
    flaw: Flaw = no_flaw
    results: dict[str, Row] = field(default_factory=dict)
    flawed: dict[str, RowFault] = field(default_factory=dict)
    """Faults of the unusable `results`."""
    useless: Counter[str] = field(default_factory=Counter)
    """Number of unusable results per row, over all attempts."""
    row_faults: dict[str, RowFault] = field(default_factory=dict)
    environment_faults: dict[str, str] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """Console lines not yet shown."""

    @property
    def count(self) -> int:
        """Rows that are finished: answered or dropped."""
        return len(self.results) + len(self.row_faults)

    @property
    def too_many_failed(self) -> bool:
        """Whether every row failed, or more than `max_failed`."""
        failed = len(self.row_faults) + len(self.flawed)
        return failed > self.max_failed or 0 < self.rows == failed

    def has(self, row_id: str) -> bool:
        """Returns whether a row is finished."""
        return row_id in self.results or row_id in self.row_faults

    def follow(self) -> None:
        """Reads the entries since the last call."""
        for line in self.journal.read_new():
            match from_entry(line):
                case Answered(row_id, row):
                    if row_id not in self.results or row_id in self.flawed:
                        self._keep(row_id, row)
                    self.row_faults.pop(row_id, None)
                    self.environment_faults.pop(row_id, None)
                case RowFault(row_id) as fault if row_id not in self.results:
                    self.row_faults[row_id] = fault
                    self.environment_faults.pop(row_id, None)
                case EnvironmentFault(row_id, reason) if not self.has(row_id):
                    self.environment_faults[row_id] = reason
                case Stopped(reason):
                    self.stops.append(reason)
                case Notice(notice):
                    self.notices.append(notice)

    def _keep(self, row_id: str, row: Row) -> None:
        self.results[row_id] = row
        self.flawed.pop(row_id, None)
        if error := self.flaw(row):
            self.flawed[row_id] = RowFault(row_id, str(error), error.cause)
            self.useless[row_id] += 1

    def prepare_retry(self) -> None:
        """Forgets what stopped an earlier attempt, including too many failed rows."""
        self.environment_faults.clear()
        self.stops.clear()
        self.notices.clear()
        if self.too_many_failed:
            self.row_faults.clear()
            for row_id in self.flawed:
                del self.results[row_id]
            self.flawed.clear()

    def check_failures(self, work: Work) -> None:
        """Counts failed rows by cause, with examples. Raises Permanent if too many rows failed,
        including those with unusable results."""
        missing = list(self.row_faults.values())
        counted = Counter(fault.cause for fault in missing)
        work.counts |= {"failed/rows": len(missing)}
        work.counts |= {f"failed/{cause}": count for cause, count in counted.items()}
        if missing:
            work.examples["failed/rows"] = [f"{f.id}: {f.row_fault}" for f in missing[:3]]
        faults = [*missing, *self.flawed.values()]
        causes = Counter(fault.cause for fault in faults)
        if 0 < self.rows == len(faults):
            raise Permanent(
                f"every row failed; the first: {faults[0].row_fault}; correct that, then run again"
            )
        if self.too_many_failed:
            first_of_each = {fault.cause: fault for fault in reversed(faults)}
            examples = [f"row '{f.id}': {shorten(f.row_fault)}" for f in first_of_each.values()]
            raise Permanent(
                f"{len(faults)} of {self.rows} rows failed ({percent(len(faults) / self.rows)}: "
                f"{list_counts(causes)}), max_failed allows {self.max_failed}; "
                f"{'; '.join(examples)}; "
                f"raise {work.name}.max_failed to go on without them, or run again to retry them"
            )


def _execute(
    work: Work, outcomes: _Outcomes, rows: list[Row], program: Program, members: list[Model]
) -> None:
    """Makes one Ray Data pass over rows that share an engine; `outcomes` follows it."""
    import ray
    from ray.data import ActorPoolStrategy
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    connect()
    settings = members[0].settings
    actors = min(settings.actors, len(rows), capacity(settings))
    make = partial(
        RowActor,
        program=program,
        members={m.name: m for m in members},
        seed=work.seed,
        journal=str(outcomes.journal.folder),
        max_failed=outcomes.max_failed,
        failed=[*outcomes.row_faults, *outcomes.flawed],
        flaw=outcomes.flaw,
        useless={r["id"]: n for r in rows if (n := outcomes.useless[r["id"]])},
        since=outcomes.journal.position,
    )
    blocks = min(len(rows), actors * settings.blocks_per_actor)
    # Per actor: enough blocks for its rows in flight, and one more.
    in_flight = min(blocks, actors * (1 + math.ceil(settings.rows_in_flight * blocks / len(rows))))
    dataset = ray.data.from_items(
        [{"row": json.dumps(row)} for row in rows], override_num_blocks=blocks
    ).map_batches(
        Dispatcher,
        fn_constructor_kwargs=work.engines.open_pass(settings, work.seed, actors, make),
        batch_size=None,
        compute=ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=in_flight),
        num_cpus=0,
        # On the driver's node: it is lost only with the driver, so Ray never resends a block
        # whose rows are still running.
        scheduling_strategy=OnNode(ray.get_runtime_context().get_node_id(), soft=True),
        max_restarts=ENGINE_DEATHS,
        max_task_retries=-1,
    )
    done = threading.Event()
    before = work.progress.done or work.progress.resumed

    def follow() -> None:
        while True:
            last = done.is_set()
            outcomes.follow()
            work.progress.done = max(before, outcomes.count)
            while outcomes.notices:
                console.warning("%s: %s", work.name, outcomes.notices.pop(0))
            if last:
                return
            done.wait(0.5)

    follower = ThreadPoolExecutor(1)
    following = follower.submit(follow)
    try:
        for _ in dataset.iter_batches(batch_size=None):
            pass
    except ray.exceptions.RayError as error:
        log.debug("row pass failed", exc_info=True)
        work.engines.close()  # rows may be in flight
        raise _pass_failure(error, members[0].name) from error
    finally:
        done.set()
        follower.shutdown()
        following.result()  # raises if the journal could not be read
    if outcomes.stops:
        kept = f" ({outcomes.count} finished rows are kept)" if outcomes.count else ""
        raise Permanent(f"{outcomes.stops[0]}{kept}")


def _describe_unanswered(stage: str, faults: dict[str, str]) -> str:
    """Returns the error line about rows left unanswered by faults of their environment; `faults`
    holds the reasons by row."""
    row_id, reason = next(iter(faults.items()))
    ids = json.dumps(list(faults)[:NAMED_ROWS], ensure_ascii=False)
    rows = "1 row was" if len(faults) == 1 else f"{len(faults)} rows were"
    those = "it" if len(faults) == 1 else "those rows"
    setting = shlex.quote(f"{stage}.give_up={ids}")
    return (
        f"{rows} not answered (row '{row_id}': {shorten(reason)}); finished rows are kept; run "
        f"again to retry {those}, or drop {those} with --set {setting}"
    )


def _pass_failure(error: Exception, model: str) -> Permanent:
    """Returns why the actors of a model failed, with the fix."""
    from ray.exceptions import ActorDiedError, RayActorError

    if blames_memory(error):
        return Permanent(
            f"the actors of model '{model}' ran out of memory; lower models.{model}.actors, "
            "concurrency or context, or use a smaller model (finished rows are kept)"
        )
    # Ray Data keeps only the text of an error inside the dispatcher.
    is_dead = isinstance(error, RayActorError) or ActorDiedError.__name__ in str(error)
    how = f"died {ENGINE_DEATHS + 1} times" if is_dead else "failed"
    return Permanent(
        f"the actors of model '{model}' {how} ({_reason(error)}); finished rows are kept, run "
        "again to continue"
    )


def _reason(error: Exception) -> str:
    """Returns the line of a remote traceback that names the first exception; the last line if none
    does."""
    lines = str(error).strip().splitlines()
    return shorten(next(filter(EXCEPTION_LINE.match, lines), lines[-1]))
