"""Tests the Batch API: what a batch holds, how results are read, and that none is sent twice."""

import asyncio
import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_batches
import pytest
from aiohttp import web
from fake_provider import Behavior, Provider, error, provider
from simulated import simulate

from zephyr_ray.demand import Calls
from zephyr_ray.engines import batch_api, batches, choices
from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.endpoint import Endpoint
from zephyr_ray.engines.governor import Governor
from zephyr_ray.engines.ledger import Ledger, Spent
from zephyr_ray.engines.meter import Meter
from zephyr_ray.engines.model import IN_REQUEST, Model
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.engines.replies import Unavailable
from zephyr_ray.engines.settings import PER_ANSWER
from zephyr_ray.errors import RowError, Temporary
from zephyr_ray.messages import assistant, user
from zephyr_ray.models.contract import STOPPING, Reply, Sampling, StopRun
from zephyr_ray.store import Journal

QUESTIONS = ["Name a fish.", "Name a bird.", "Name a tree.", "Name a town.", "Name a river."]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows without timers of their own reach a batch in the same iteration of the event loop.
    monkeypatch.setattr(choices, "JOIN_SECONDS", 0)
    monkeypatch.setattr(batches, "QUIET_SECONDS", 0.03)
    monkeypatch.setattr(batch_api, "POLL_SECONDS", 0.03)
    monkeypatch.setattr(batch_api, "RETRY_SECONDS", 0.03)


def settings(url: str, **more: Any) -> OpenAISettings:
    usual = {"batch": True, "temperature": 0, "price": Behavior().price}
    return OpenAISettings(model="peer", base_url=url, **usual | more)


def run(
    server: Provider, folder: Path, questions: list[str] = QUESTIONS, turns: int = 1, **more: Any
) -> list[Any]:
    """Asks one question per row, all at once, as a new process; returns answers or errors."""

    async def row(engine: Any, model: Model, number: int, text: str) -> str:
        ask, messages = engine.ask_for(model, {"id": f"r{number}"}), [user(text)]
        for _ in range(turns):
            reply = await ask(messages, max_tokens=40)
            messages += [assistant(reply.text), user("And another?")]
        return reply.text

    async def main() -> list[Any]:
        log = AnswerLog(folder, seed=0)
        log.refresh()
        options = settings(server.url, **more)
        governor = Governor(folder / "ledger", uuid.uuid4().hex, {"m": options.tariff()})
        model = Model("m", options, answers=log, meter=Meter(governor, "stage", "m"))
        engine = model.settings.start(seed=0)
        rows = (row(engine, model, number, text) for number, text in enumerate(questions))
        return await asyncio.gather(*rows, return_exceptions=True)

    return asyncio.run(main())


def paid(folder: Path) -> Spent:
    """Returns what the runs in a folder paid, according to their ledger."""
    return Ledger(folder / "ledger").spent()["m"]


def sizes(server: Provider) -> list[int]:
    """Returns the number of requests of each batch."""
    return [batch["request_counts"]["total"] for batch in server.batches.all.values()]


def test_each_turn_of_all_rows_is_a_batch_at_half_the_price(tmp_path: Path) -> None:
    with provider() as server:
        alone = run(server, tmp_path / "alone", turns=2, batch=False)
        full = server.dollars
        assert run(server, tmp_path / "batch", turns=2) == alone
    assert sizes(server) == [5, 5]
    assert server.dollars - full == pytest.approx(full / 2)
    assert (paid(tmp_path / "alone").dollars, paid(tmp_path / "batch").dollars) == pytest.approx(
        (full, full / 2)
    )


def test_the_plan_knows_the_price_and_rows_in_flight_of_batches() -> None:
    alone, batched = (
        OpenAISettings(model="m", base_url="http://a/v1", price=(2, 4), batch=batch)
        for batch in (False, True)
    )
    calls = Calls(1, 1e6, 1e6)
    assert (alone.dollars(calls), batched.dollars(calls)) == (6, 3)
    assert (alone.concurrency, batched.concurrency) == (64, 50_000)
    assert (alone.blocks_per_actor, batched.blocks_per_actor) == (4, 2)
    assert settings("http://a/v1", concurrency=9).concurrency == 9


def test_batches_are_sent_by_one_actor() -> None:
    with pytest.raises(ValueError, match="batch\n.*needs actors: 1; one actor sends"):
        settings("http://a/v1", actors=2)
    assert settings("http://a/v1", actors=2, batch=False).actors == 2


class Killed(Temporary):
    pass


def after(number: int, function: Callable) -> Callable:
    """Wraps a function; call `number` (from 0) and later ones raise Killed after taking effect."""
    calls = iter(range(number))

    async def asynchronous(*args: Any, **kwargs: Any) -> Any:
        result = await function(*args, **kwargs)
        if next(calls, None) is None:
            raise Killed
        return result

    def synchronous(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        if next(calls, None) is None:
            raise Killed

    return asynchronous if asyncio.iscoroutinefunction(function) else synchronous


class OwnJournal(Journal):
    """The Journal class of batches only, so that patching it leaves the ledger's alone."""


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        *((Endpoint, "call", number) for number in range(4)),  # upload, create, poll, download
        *((OwnJournal, "append", number) for number in range(3)),
        (AnswerLog, "append", 0),
        (AnswerLog, "append", 3),
        (AnswerLog, "append", 4),  # all answers are kept, so no request collects the batch
    ],
)
def test_a_batch_is_sent_once_whenever_the_run_is_killed(
    owner: type, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider(Behavior(batch_seconds=0)) as server:  # it is over at the first poll
        with monkeypatch.context() as patch:
            patch.setattr(batches, "Journal", OwnJournal)
            patch.setattr(owner, name, after(number, getattr(owner, name)))
            assert all(isinstance(answer, Killed) for answer in run(server, tmp_path))
        answers = run(server, tmp_path)
        assert answers == run(server, tmp_path / "other", batch=False)
        assert sizes(server) == [5]
        bill = server.bills["peer (batch)"]
        assert bill.repeated == 0
        assert run(server, tmp_path) == answers and sizes(server) == [5]
    spent = paid(tmp_path)
    assert spent.dollars == pytest.approx(bill.dollars) and spent.unknown_requests == 0


def test_a_batch_whose_creation_gets_no_reply_is_not_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Endpoint.call, []

    async def call(self: Endpoint, *args: Any, **kwargs: Any) -> Any:
        response = await plain(self, *args, **kwargs)
        calls.append(args)
        if len(calls) == 2:
            raise Unavailable("no reply")
        return response

    monkeypatch.setattr(Endpoint, "call", call)
    with provider() as server:
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))
    assert calls[1] == ("POST", "/batches") and sizes(server) == [5]


@pytest.mark.parametrize("down", ["/batches", "/batches/batch_0", "/files/file-1/content"])
def test_a_batch_is_not_sent_again_if_the_endpoint_is_down_afterwards(
    down: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply to its creation, to a poll or to the download of its answers is lost."""
    plain, lost = Endpoint.call, []

    async def call(self: Endpoint, method: str, path: str, **request: Any) -> Any:
        response = await plain(self, method, path, **request)
        if path == down:
            lost.append(path)
            raise Unavailable("no reply")
        return response

    with provider(Behavior(batch_seconds=0.01)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(batch_api, "WAIT_SECONDS", -1)
            patch.setattr(Endpoint, "call", call)
            answers = run(server, tmp_path)
        assert all("run again to collect the batch" in str(answer) for answer in answers)
        assert lost == [down]
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))
    assert sizes(server) == [5]


def test_a_batch_is_sent_once_no_request_has_come_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    async def send(self: batches.Batches, lines: list[Any]) -> None:
        sent.append(len(lines))
        for line in lines:
            line.choices.set_result([])

    async def main() -> None:
        sender = batches.Batches(
            Endpoint(settings("http://a/v1"), "m"), AnswerLog(tmp_path, seed=0)
        )

        async def row(seconds: float) -> None:
            await asyncio.sleep(seconds)
            await sender.post({}, ["key"])

        quiet = batches.QUIET_SECONDS
        await asyncio.gather(*(row(count * quiet) for count in (0, 0.7, 1.4, 9)))

    monkeypatch.setattr(batches.Batches, "_send", send)
    simulate(main())
    assert sent == [3, 1]


def test_cancelling_a_row_keeps_the_other_answers_of_its_batch(tmp_path: Path) -> None:
    async def main(server: Provider) -> Any:
        options = settings(server.url)
        sender = batches.Batches(Endpoint(options, "m"), AnswerLog(tmp_path, seed=0))
        bodies = [
            {"model": options.model, "messages": [user(text)], "max_tokens": 20}
            for text in ("Hi", "Ho")
        ]
        first, second = (
            asyncio.ensure_future(sender.post(body, [64 * digit]))
            for body, digit in zip(bodies, "12", strict=True)
        )
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.wait_for(second, 60)

    with provider(Behavior(batch_seconds=0.01)) as server:
        [reply] = asyncio.run(main(server))
    assert isinstance(reply, Reply) and sizes(server) == [2]


def test_samples_of_one_prompt_are_one_line_and_collected_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider() as server:
        with monkeypatch.context() as patch:
            patch.setattr(AnswerLog, "append", after(1, AnswerLog.append))
            run(server, tmp_path, ["Hi"] * 3, temperature=1)
        answers = run(server, tmp_path, ["Hi"] * 3, temperature=1)
    assert [body["n"] for body in server.bodies] == [3]
    assert len(set(answers)) == 3


def test_a_stage_that_stops_leaves_its_batch_to_the_next_run(tmp_path: Path) -> None:
    async def main(server: Provider) -> Any:
        stopping = asyncio.Event()
        STOPPING.set(stopping)
        model = Model("m", settings(server.url), answers=AnswerLog(tmp_path, seed=0))
        ask = model.settings.start(seed=0).ask_for(model, {"id": "r0"})
        answer = asyncio.create_task(ask([user(QUESTIONS[0])], max_tokens=40))
        while not (server.batches.all or answer.done()):
            await asyncio.sleep(0.01)
        stopping.set()
        return await asyncio.wait_for(answer, 60)

    with provider() as server:
        server.batches.held = True
        with pytest.raises(Temporary, match="batch batch_0 is not over; run again to collect it"):
            asyncio.run(main(server))
        server.batches.held = False
        assert isinstance(run(server, tmp_path, QUESTIONS[:1])[0], str)
    assert sizes(server) == [1]


def test_requests_that_a_batch_did_not_reach_are_sent_in_another(tmp_path: Path) -> None:
    with provider(Behavior(batch_ends=("expired",))) as server:
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))
    assert sizes(server) == [5, 3]
    assert server.bills["peer (batch)"].repeated == 0


def test_a_request_that_no_batch_reaches_is_left_to_the_next_run(tmp_path: Path) -> None:
    with provider(Behavior(batch_ends=("expired",) * 9)) as server:
        [answer] = run(server, tmp_path, QUESTIONS[:1])
    assert isinstance(answer, Temporary) and "expired before this request" in str(answer)
    assert sizes(server) == [1] * batches.TRIES


def test_a_cancelled_batch_stops_the_run_and_keeps_what_it_answered(tmp_path: Path) -> None:
    with provider(Behavior(batch_ends=("cancelled",))) as server:
        answers = run(server, tmp_path)
        assert [type(answer) for answer in answers] == [str, str, StopRun, StopRun, StopRun]
        assert "batch batch_0 was cancelled; run again" in str(answers[-1])
        assert run(server, tmp_path)[:2] == answers[:2]
    assert sizes(server) == [5, 3]


def test_a_batch_that_the_endpoint_forgot_can_be_sent_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "batches", "earlier")
    log = AnswerLog(tmp_path, seed=0)
    key = log.key([user("Hi")], Sampling(0.0, 0.95, 40), "r0")
    journal.append({"file": "file-9", "lines": [[key]], "tickets": [None]})
    journal.append({"file": "file-9", "batch": "batch_9"})
    with provider() as server:
        [answer] = run(server, tmp_path, ["Hi"])
        assert isinstance(answer, StopRun)
        assert "does not know batch batch_9, which an earlier run sent; use the" in str(answer)
        assert f"delete {tmp_path / 'batches'} to" in str(answer)
        shutil.rmtree(tmp_path / "batches")
        assert isinstance(run(server, tmp_path, ["Hi"])[0], str)
    assert sizes(server) == [1]


def kill_before_the_batch(server: Provider, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until the file of requests is recorded, and deletes it at the endpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(batches, "Journal", OwnJournal)
        patch.setattr(OwnJournal, "append", after(0, OwnJournal.append))
        assert all(isinstance(answer, Killed) for answer in run(server, folder))
    server.batches.files.clear()


@pytest.mark.parametrize("status", [400, 404])
def test_a_file_that_the_endpoint_does_not_know_is_not_sent_again(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch may be running in the project of another API key."""
    with provider() as server:
        server.batches.refusal = status
        kill_before_the_batch(server, tmp_path, monkeypatch)
        answers = run(server, tmp_path)
        assert all(isinstance(answer, StopRun) for answer in answers) and sizes(server) == []
        assert "does not know file file-0, which an earlier run sent; use the" in str(answers[0])
        shutil.rmtree(tmp_path / "batches")
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))


def test_a_batch_refused_for_another_reason_than_its_file_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def create(self: fake_batches.Batches, request: Any) -> Any:
        return web.json_response(error("No credits.", code="insufficient_quota"), status=429)

    with monkeypatch.context() as patch:
        patch.setattr(fake_batches.Batches, "_create", create)
        with provider() as server:
            [answer] = run(server, tmp_path, ["Hi"])
            [again] = run(server, tmp_path, ["Hi"])
            assert isinstance(answer, StopRun) and str(again) == str(answer)
            assert len(server.batches.files) == 1


def leave_batch(server: Provider, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs until the batch is created, and returns it once it is over."""
    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "call", after(2, Endpoint.call))
        run(server, folder)
    batch = server.batches.all["batch_0"]
    until = time.monotonic() + 60
    while batch["status"] not in batch_api.OVER and time.monotonic() < until:
        time.sleep(0.01)
    return batch


def test_a_batch_is_collected_after_batches_are_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider() as server:
        leave_batch(server, tmp_path, monkeypatch)
        late = AnswerLog(tmp_path, seed=0)  # an actor that reads the log before another collects
        late.refresh()
        answers = run(server, tmp_path, [*QUESTIONS, "Name a road."], batch=False)
        model = Model("m", settings(server.url, batch=False, actors=2), answers=late)
        ask = model.settings.start(seed=0).ask_for(model, {"id": "r0"})
        assert asyncio.run(ask([user(QUESTIONS[0])], max_tokens=40)).text == answers[0]
        bills = server.bills
        assert [bills[name].requests for name in ("peer (batch)", "peer")] == [5, 1]
        assert sizes(server) == [5] and sum(bill.repeated for bill in bills.values()) == 0
    # The batch costs half, as its reservations say.
    assert paid(tmp_path).dollars == pytest.approx(sum(bill.dollars for bill in bills.values()))
    assert (paid(tmp_path).requests, paid(tmp_path).unknown_requests) == (6, 0)


def test_a_batch_in_doubt_is_not_created_after_batches_are_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider() as server:
        kill_before_the_batch(server, tmp_path, monkeypatch)
        # Its file is gone, so the batch may be under way in another project.
        assert all(isinstance(answer, StopRun) for answer in run(server, tmp_path, batch=False))
        server.batches.files["file-0"] = ""
        answers = run(server, tmp_path, QUESTIONS[:3], batch=False)
        assert all(isinstance(answer, str) for answer in answers) and sizes(server) == []
        # The file stays unused once batches are on again: three of its requests are answered.
        assert run(server, tmp_path)[:3] == answers and sizes(server) == [2]
        assert sum(bill.requests for bill in server.bills.values()) == 5
    assert (paid(tmp_path).requests, paid(tmp_path).unknown_requests) == (5, 0)


def test_without_batches_none_are_recorded(tmp_path: Path) -> None:
    with provider() as server:
        run(server, tmp_path, ["Hi"], batch=False)
    assert not (tmp_path / batches.FOLDER).exists()


def test_equal_requests_in_a_batch_of_an_earlier_version_have_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider() as server:
        with monkeypatch.context() as patch:
            patch.setattr(Endpoint, "call", after(2, Endpoint.call))
            run(server, tmp_path, ["Hi"] * 3, temperature=1)
        [path] = (tmp_path / batches.FOLDER).iterdir()
        entries = [json.loads(line) for line in path.read_text().split("\n") if line]
        [keys] = entries[0]["lines"]
        assert len(set(keys)) == 3
        entries[0]["lines"] = [keys[:1] * 3]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        collected, logged = (run(server, tmp_path, ["Hi"], temperature=1) for _ in range(2))
        assert collected == logged and [body["n"] for body in server.bodies] == [3]


def test_answers_whose_file_expired_are_paid_for_again_only_by_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider(Behavior(batch_seconds=0.01)) as server:
        leave_batch(server, tmp_path, monkeypatch)
        server.batches.files.clear()
        answers = run(server, tmp_path)
        assert all(isinstance(answer, StopRun) for answer in answers) and sizes(server) == [5]
        assert "batch batch_0: its answers were paid for, but their file" in str(answers[0])
        assert paid(tmp_path).unknown_requests == 5
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))
        assert sizes(server) == [5, 5]


def test_errors_whose_file_expired_are_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider(Behavior(batch_seconds=0.01, batch_ends=("expired",))) as server:
        batch = leave_batch(server, tmp_path, monkeypatch)
        del server.batches.files[batch["error_file_id"]]
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))
        assert sizes(server) == [5, 3] and server.bills["peer (batch)"].repeated == 0


@pytest.mark.parametrize("code", ["model_not_found", "invalid_json_line"])
def test_a_batch_that_would_fail_for_every_row_stops_the_run(code: str, tmp_path: Path) -> None:
    with provider(Behavior(batch_ends=(code,))) as server:
        answers = run(server, tmp_path)
        assert all(isinstance(answer, StopRun) for answer in answers)
        assert "batch batch_0 failed" in str(answers[0]) and "; correct " in str(answers[0])
        # Once it is corrected, the requests are sent again.
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))


def test_batches_too_large_for_the_queue_are_split_and_sent_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "TRIES", 1)  # a full queue does not count as a try
    with provider(Behavior(queue=2)) as server:
        assert all(isinstance(answer, str) for answer in run(server, tmp_path))
    assert sizes(server) == [5, 2, 2, 1]
    assert paid(tmp_path).requests == 5


def test_each_line_is_read_like_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is withheld, one fails twice, and all have a parameter that the model rejects."""
    withheld = error("Flagged.", code="content_filter")
    failures = iter([(500, error("It broke.")), (429, error("Slow down."))])

    def answer(self: Provider, body: dict[str, Any], batched: bool = False) -> Any:
        text = body["messages"][0]["content"]
        if batched and text == QUESTIONS[1] and "max_tokens" not in body:
            return 400, withheld, None
        if batched and text == QUESTIONS[2] and (failure := next(failures, None)):
            return *failure, None
        return plain(self, body, batched)

    plain = Provider.answer
    monkeypatch.setattr(Provider, "answer", answer)
    with provider(Behavior(refuses=("max_tokens",))) as server:
        answers = run(server, tmp_path)
        monkeypatch.setattr(Provider, "answer", plain)
        # A failed row's request is sent again if a run retries the row.
        assert isinstance(run(server, tmp_path, QUESTIONS[:2])[1], str)
    assert [type(answer) for answer in answers] == [str, RowError, str, str, str]
    assert answers[1].cause == "content filter"
    assert sizes(server)[0] == 5 and sum(sizes(server)) == 5 + 5 + 2 + 2


def test_a_result_file_may_have_odd_and_missing_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One result is missing; other lines are not results, or are errors of answered requests."""
    plain, odd = fake_batches.Batches._store, "sea\u2028line \x85 and \u2029"
    results = iter(range(9))

    def store(self: fake_batches.Batches, text: str) -> str:
        if '"response"' not in text:
            return plain(self, text)
        lines = [json.loads(line) for line in text.splitlines()]
        if next(results) == 0:
            lines = [line for line in lines if line["custom_id"] != "1"]
        for line in lines:
            line["response"]["body"]["choices"][0]["message"]["content"] = odd
        failed = [{**line, "response": None, "error": {"message": "expired"}} for line in lines]
        batch = next(b for b in self.all.values() if "output_file_id" not in b)
        batch["error_file_id"] = plain(self, "".join(json.dumps(line) + "\n" for line in failed))
        named = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
        return plain(self, "".join(['{"response": null}\n', "7\n", *named]))

    monkeypatch.setattr(fake_batches.Batches, "_store", store)
    with provider() as server:
        assert run(server, tmp_path) == [odd] * 5
    assert sizes(server) == [5, 1]
    assert (paid(tmp_path).requests, paid(tmp_path).unknown_requests) == (5, 1)


@pytest.mark.parametrize("batch", [False, True])
def test_a_model_with_a_price_pays_for_its_requests_to_a_shared_engine(
    batch: bool, tmp_path: Path
) -> None:
    """Another model of the engine, which has no price, sends the same request."""

    async def main(server: Provider) -> Governor:
        log, options = AnswerLog(tmp_path, seed=0), settings(server.url, batch=batch)
        governor = Governor(tmp_path / "ledger", "run", {"m": options.tariff()})
        free = Model("free", options.model_copy(update={"price": None}), answers=log)
        models = [free, Model("m", options, answers=log, meter=Meter(governor, "stage", "m"))]
        engine = options.start(seed=0)
        asks = [engine.ask_for(model, {"id": model.name}) for model in models]
        tasks = [asyncio.create_task(ask([user("Hi")], max_tokens=40)) for ask in asks]
        await asyncio.gather(*tasks)
        return governor

    with provider() as server:
        governor = asyncio.run(main(server))
        assert [bill.requests for bill in server.bills.values()] == [2]
    assert governor._ledger.reserved == 0 and paid(tmp_path).requests == 1


def test_a_request_without_an_answer_log_is_not_batched() -> None:
    """A judge that `zephyr serve` hosts cannot wait for a batch."""
    with provider() as server:
        engine = settings(server.url).start(seed=0)
        reply = asyncio.run(engine.answer([user("Hi")], Sampling(0, 1, 8)))
    assert isinstance(reply, Reply) and not server.batches.all


def test_models_that_share_an_engine_share_its_log() -> None:
    """Batches record what they sent in the answer-log folder of the first model."""
    identity = settings("http://a/v1", demonstrations="d.jsonl", questions="q.yaml").identity()
    assert PER_ANSWER & identity.keys() <= IN_REQUEST
