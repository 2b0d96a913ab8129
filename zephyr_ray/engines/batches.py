"""Sends requests in batches (OpenAI's Batch API): half the price, answers within 24 hours.

A batch contains the requests of all rows that wait at the same time, so a stage whose rows send two
requests in succession sends two batches. A journal on the storage, beside the answers of the model,
lists what was sent, so that a restart collects a batch instead of sending it again, even if it
sends its other requests one by one:

    {"file": "file-1", "lines": [["<key>", …], …], "tickets": […]}   before the batch is created
    {"file": "file-1", "batch": "batch_1"}                           before it is waited for
    {"file": "file-1", "over": true}                                 once its answers are in the log
"""

import asyncio
import json
import uuid
from dataclasses import dataclass

from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.batch_api import BatchApi, Json
from zephyr_ray.engines.batch_results import (
    AnswersLost,
    QueueFull,
    Result,
    read_failure,
    read_result,
    used_tokens,
)
from zephyr_ray.engines.choices import Outcome
from zephyr_ray.engines.endpoint import Endpoint, log
from zephyr_ray.engines.governor import Settlement
from zephyr_ray.engines.meter import FREE, METER, Meter, most_tokens
from zephyr_ray.engines.replies import Rejected, Unavailable
from zephyr_ray.engines.tariff import Usage
from zephyr_ray.errors import RowError, Temporary
from zephyr_ray.formatting import number as in_digits
from zephyr_ray.models.contract import Reply, StopRun
from zephyr_ray.store import Journal

MOST_LINES, MOST_BYTES = 50_000, 150_000_000
"""Maximum requests and bytes per batch; OpenAI takes 200 MB."""
FOLDER = "batches"
"""Folder of the journal, below that of the answers."""
QUIET_SECONDS = 5
"""Seconds without a new request after which a batch is sent."""
TRIES = 3
"""Maximum batches per request, if batches expire or lines have server errors."""


@dataclass(eq=False)
class _Line:
    """A request that waits for its batch."""

    body: Json
    keys: list[str]
    """Keys of the rows that share the request, in the order of its choices."""
    ticket: str | None
    """The reservation of its cost; None without a price."""
    choices: asyncio.Future[list[Outcome]]


@dataclass(eq=False)
class _Batch:
    """A batch that was sent."""

    file: str
    """Input file of the batch."""
    keys: list[list[str]]
    """Keys of the rows that share each request."""
    tickets: list[str | None]
    """Reservations of the cost of each request."""
    id: str | None = None
    """None if it is uncertain whether it was created."""
    results: asyncio.Task[list[Result]] | None = None


def read_unfinished(answers: AnswerLog) -> dict[str, tuple[_Batch, int, int]]:
    """Returns the requests in unfinished batches of earlier runs, by key: the batch, the number
    of the line, and the number of the choice."""
    if not (folder := answers.folder / FOLDER).is_dir():
        return {}
    # Each process writes to its own file, so the entries of a batch are in no order.
    entries = list(Journal(folder).read_new())
    ids = {entry["file"]: entry["batch"] for entry in entries if "batch" in entry}
    over = {entry["file"] for entry in entries if "over" in entry}
    batches = [
        _Batch(entry["file"], entry["lines"], entry["tickets"], ids.get(entry["file"]))
        for entry in entries
        if "lines" in entry and entry["file"] not in over
    ]
    places: dict[str, tuple[_Batch, int, int]] = {}
    for batch in batches:
        for line, keys in enumerate(batch.keys):
            for choice, key in enumerate(keys):
                # If a version that sent equal requests wrote it: the log keeps the first answer.
                places.setdefault(key, (batch, line, choice))
    return places


class Batches:
    """Collects the requests of one process into batches, and the batches of earlier runs."""

    def __init__(self, endpoint: Endpoint, answers: AnswerLog, creates: bool = True):
        """Several processes may collect the same batch, but only one may create batches."""
        self._api, self._name, self._creates = BatchApi(endpoint), endpoint.name, creates
        self.answers = answers
        """The log that answers are written to."""
        self._journal = Journal(answers.folder / FOLDER, writer=uuid.uuid4().hex[:12])
        self._earlier = read_unfinished(answers)
        self._waiting: list[_Line] = []
        self._collector: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._most = MOST_LINES
        self._one_at_a_time = False
        self._meter: Meter | None = None
        """The meter of the latest request that has one. Any meter can settle all requests, and the
        context that sends a batch may belong to a request without a meter."""

    async def collect(self, key: str) -> Reply | None:
        """Returns the answer to a request that an earlier run sent; None if it must be sent again.
        Raises RowError if the row is at fault, StopRun if the answer was lost."""
        if key not in self._earlier:
            return None
        self._meter = METER.get() or self._meter
        batch, line, choice = self._earlier.pop(key)
        if batch.results is None:
            batch.results = asyncio.create_task(self._finish(batch))
        result = (await batch.results)[line]
        outcomes = dict(enumerate(result)) if isinstance(result, list) else {choice: result}
        outcome = outcomes.get(choice)
        if isinstance(outcome, RowError | AnswersLost):
            raise outcome
        return outcome if isinstance(outcome, Reply) else None

    async def post(self, body: Json, keys: list[str]) -> list[Outcome]:
        """Returns the choices of a request, and writes its answers to the log. Raises as
        `replies.read_object` does."""
        tries, meter = 0, METER.get()
        self._meter = meter or self._meter
        while True:
            ticket = await meter.reserve(most_tokens(body, meter.model)) if meter else None
            line = _Line(body, keys, ticket, asyncio.get_running_loop().create_future())
            self._waiting.append(line)
            if self._collector is None or self._collector.done():
                self._collector = asyncio.create_task(self._collect())
            try:
                return await line.choices
            except Unavailable as error:
                tries += not isinstance(error, QueueFull)
                if tries == TRIES:
                    raise

    async def _collect(self) -> None:
        """Sends batches until no request waits."""
        while self._waiting:
            size = 0
            while size < len(self._waiting) < self._most:
                size = len(self._waiting)
                await asyncio.sleep(QUIET_SECONDS)
            if self._one_at_a_time and self._sending:
                await asyncio.wait(self._sending)
                continue
            task = asyncio.create_task(self._send(self._take()))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def _take(self) -> list[_Line]:
        """Removes and returns as many waiting lines as fit one batch."""
        size, lines = 0, self._waiting[: self._most]
        for number, line in enumerate(lines):
            size += len(json.dumps(line.body))
            if size > MOST_BYTES and number:
                lines = lines[:number]
                break
        del self._waiting[: len(lines)]
        return lines

    async def _send(self, lines: list[_Line]) -> None:
        """Sends one batch and passes its results to the rows that wait for them."""
        tickets = [line.ticket for line in lines]
        try:
            try:
                file = await self._api.upload([line.body for line in lines])
            except Exception:
                await self._settle(tickets, [FREE] * len(lines))
                raise
            batch = _Batch(file, [line.keys for line in lines], tickets)
            self._journal.append({"file": file, "lines": batch.keys, "tickets": tickets})
            try:
                batch.id = await self._api.create(file)
                results = await self._finish(batch)
            except Unavailable as error:
                # The batch may be under way; sending its requests again would pay for them twice.
                raise Temporary(f"{error}; run again to collect the batch") from None
        except Exception as error:
            results = [error] * len(lines)
        if isinstance(results[0], QueueFull):
            self._most, self._one_at_a_time = len(lines) // 2, True
        for line, result in zip(lines, results, strict=True):
            if line.choices.done():  # its row was cancelled
                continue
            if isinstance(result, list):
                line.choices.set_result(result)
            else:
                line.choices.set_exception(result)

    async def _finish(self, batch: _Batch) -> list[Result]:
        """Waits for a batch; returns the results of its lines, with the answers in the log."""
        if batch.id is None:
            batch.id = await self._find_or_create(batch.file)
        if batch.id is None:
            await self._settle(batch.tickets, [FREE] * len(batch.tickets))
            self._journal.append({"file": batch.file, "over": True})
            return [Unavailable(f"{self._name}: no batch was created")] * len(batch.keys)
        self._journal.append({"file": batch.file, "batch": batch.id})
        results, usages = await self._wait(batch.id, list(map(len, batch.keys)))
        # Before the answers are kept: a batch whose requests are all answered is not collected.
        await self._settle(batch.tickets, usages)
        for keys, result in zip(batch.keys, results, strict=True):
            for key, outcome in zip(keys, result if isinstance(result, list) else (), strict=False):
                if isinstance(outcome, Reply) and not self.answers.find(key):
                    self.answers.append(key, outcome)
        self._journal.append({"file": batch.file, "over": True})
        return results

    async def _find_or_create(self, file: str) -> str | None:
        """Returns the id of the batch of a file that an earlier run uploaded; None if it has none,
        and this process creates none. Raises StopRun if the endpoint has neither, because the batch
        may be under way in another project."""
        if batch := await self._api.find(file):
            return batch
        if not self._creates:
            if await self._api.has_file(file):
                return None
            raise self._unknown(f"file {file}")
        try:
            return await self._api.create(file)
        except (Rejected, StopRun):
            if await self._api.has_file(file):
                raise
        raise self._unknown(f"file {file}")

    def _unknown(self, what: str) -> StopRun:
        return StopRun(
            f"{self._name}: does not know {what}, which an earlier run sent; use the API key "
            "of that run, or, if no batch of the model is under way, delete "
            f"{self._journal.folder} to send the requests again"
        )

    async def _wait(self, batch: str, counts: list[int]) -> tuple[list[Result], list[Usage | None]]:
        """Waits for a batch; returns the results of its lines, and the tokens that they used.
        `counts` are the numbers of choices that they asked for."""
        where, lines = f"{self._name}: batch {batch}", len(counts)
        log.warning("%s: waiting for batch %s of %s requests", self._name, batch, in_digits(lines))
        state = await self._api.wait(batch)
        if state is None:
            raise self._unknown(f"batch {batch}")
        if state["status"] == "failed":
            return [read_failure(state, where, lines)] * lines, [FREE] * lines
        by_id: dict[str, Json] = {}
        for content in ("error", "output"):  # if a line is in both, its answer counts
            file = state.get(f"{content}_file_id")
            objects = await self._api.download(file) if file else []
            if objects is None and content == "output":
                lost = AnswersLost(
                    f"{where}: its answers were paid for, but their file {file} expired or was "
                    "deleted; run again to send, and pay for, its requests again"
                )
                return [lost] * lines, [None] * lines
            by_id |= {str(line.get("custom_id")): line for line in objects or ()}
        in_order = [by_id.get(str(number), {}) for number in range(lines)]
        results = [
            read_result(line, state, where, count)
            for line, count in zip(in_order, counts, strict=True)
        ]
        return results, list(map(used_tokens, in_order))

    async def _settle(self, tickets: list[str | None], usages: list[Usage | None]) -> None:
        """Settles the reservations of requests."""
        if meter := self._meter:
            pairs = zip(tickets, usages, strict=True)
            await asyncio.gather(*(meter.settle(t, Settlement(usage)) for t, usage in pairs if t))
