"""Tests how the cost of a request is counted, and that the budget is not exceeded."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import GOOD, HTML, Answer, completion, endpoint, error
from simulated import reserve_one, settle_one, simulate

from zephyr_ray.engines import endpoint as endpoints
from zephyr_ray.engines.governor import Governor, Refused, Settlement
from zephyr_ray.engines.ledger import Ledger, Spent
from zephyr_ray.engines.meter import METER, Attempt, Meter, most_tokens
from zephyr_ray.engines.openai import OpenAIEngine, OpenAISettings
from zephyr_ray.engines.replies import Unavailable
from zephyr_ray.engines.tariff import Price, Tariff, Usage, read_usage
from zephyr_ray.errors import RowError, Temporary
from zephyr_ray.messages import user
from zephyr_ray.models.contract import REQUESTS, STOPPING, Sampling, StopRun
from zephyr_ray.store import Journal

TARIFFS = {"m": Tariff("a", price=Price(1e6, 1e5, 5e5)), "n": Tariff("b", price=Price(1e6, 1e6, 0))}
"""Dollars per (input, output, cached input) token: 1, 0.1 and 0.5 for m; 1, 1 and 0 for n."""


def governor(folder: Path, run: str = "run", budget: float | None = None) -> Governor:
    return Governor(folder, run, TARIFFS, budget)


def reserve(governor: Governor, most: Usage, model: str = "m", stage: str = "s") -> str:
    [ticket] = asyncio.run(asyncio.wait_for(governor.reserve(stage, model, [most]), 60))
    assert isinstance(ticket, str)
    return ticket


def settle(governor: Governor, ticket: str, usage: Usage | None) -> None:
    asyncio.run(settle_one(governor, ticket, Settlement(usage)))


def test_costs_are_those_of_the_tokens_used(tmp_path: Path) -> None:
    running = governor(tmp_path)
    settle(running, reserve(running, Usage(100, 50)), Usage(10, 4, cached=6))
    settle(running, reserve(running, Usage(100, 50)), Usage(1, 0))
    settle(running, reserve(running, Usage(100, 50), "n", "t"), Usage(2, 3))
    # One request: 4 new and 6 cached input tokens, 4 output tokens; the other: 1 input token.
    m = Spent(requests=2, input_tokens=11, cached_tokens=6, output_tokens=4, dollars=8.4)
    n = Spent(requests=1, input_tokens=2, output_tokens=3, dollars=5.0)
    for ledger in (running._ledger, Ledger(tmp_path)):
        assert ledger.spent("s") == {"m": m} and ledger.spent("t") == {"n": n}
        assert ledger.spent() == {"m": m, "n": n}
        assert ledger.max_dollars == pytest.approx(13.4)


@pytest.mark.parametrize(
    ("counts", "output"),
    [
        ({"total_tokens": 135}, 103),  # 94 tokens of reasoning are only in the total
        ({"total_tokens": 41}, 9),
        ({"total_tokens": 0}, 9),
        ({"total_tokens": "135"}, 9),
        ({}, 9),
    ],
)
def test_tokens_that_only_the_total_includes_are_output(
    counts: dict[str, Any], output: int
) -> None:
    usage = {"prompt_tokens": 32, "completion_tokens": 9, **counts}
    assert read_usage({"usage": usage}) == Usage(32, output)


def test_a_request_costs_what_its_model_cost_when_it_was_sent(tmp_path: Path) -> None:
    """In the run that learns the cost, the model has another price, or another name."""
    ticket, other = [reserve(governor(tmp_path, run), Usage(100, 50)) for run in ("a", "b")]
    dearer = Governor(tmp_path, "dearer", {"m": Tariff("a", price=Price(2e6, 2e6, 2e6))})
    settle(dearer, ticket, Usage(10, 4))
    renamed = Governor(tmp_path, "renamed", {"k": TARIFFS["m"]})
    settle(renamed, other, Usage(20, 0))
    # 10 input tokens at 1 and 4 output tokens at 0.1; 20 input tokens at 1.
    m = Spent(requests=2, input_tokens=30, output_tokens=4, dollars=30.4)
    assert Ledger(tmp_path).spent() == {"m": m}


def test_a_request_of_an_earlier_version_costs_at_most_its_reservation(tmp_path: Path) -> None:
    """It recorded no price: a batch was reserved at half of today's."""
    journal = Journal(tmp_path, "earlier")
    journal.append({"reserve": "earlier-0", "stage": "s", "model": "m", "usd": 5.0})
    settle(governor(tmp_path), "earlier-0", Usage(10, 4))  # 10.4 at today's price
    m = Spent(requests=1, input_tokens=10, output_tokens=4, dollars=5.0)
    assert Ledger(tmp_path).spent() == {"m": m}


def test_a_request_at_a_price_that_is_not_known_counts_at_its_reservation(tmp_path: Path) -> None:
    """An earlier version recorded no price, and the model has another name."""
    journal = Journal(tmp_path, "earlier")
    for number in range(2):
        journal.append({"reserve": f"earlier-{number}", "stage": "s", "model": "old", "usd": 7.0})
    running = governor(tmp_path)
    settle(running, "earlier-0", Usage(10, 4))
    settle(running, "earlier-1", Usage())  # it was not sent
    assert Ledger(tmp_path).spent() == {"old": Spent(unknown_requests=1, unknown_dollars=7.0)}


def test_a_request_of_unknown_cost_counts_at_its_reservation(tmp_path: Path) -> None:
    running = governor(tmp_path)
    settle(running, reserve(running, Usage(100, 50)), None)
    assert running._ledger.spent() == {"m": Spent(unknown_requests=1, unknown_dollars=105.0)}


def test_a_request_in_flight_at_a_kill_may_be_paid_twice(tmp_path: Path) -> None:
    killed = governor(tmp_path, "killed")
    tickets = [reserve(killed, Usage(100, 50)) for _ in range(3)]
    settle(killed, tickets[0], Usage(1, 0))
    assert killed._ledger.reserved == 210 and killed._ledger.max_dollars == 1
    again = governor(tmp_path, "a run whose file is read first")
    lost = Spent(
        requests=1,
        input_tokens=1,
        dollars=1.0,
        unknown_requests=2,
        unknown_dollars=210.0,
        repeated_requests=2,
    )
    assert again._ledger.spent("s") == {"m": lost} and again._ledger.max_dollars == 211
    # A later run learns the cost of one of them, for example from a batch.
    settle(again, tickets[2], Usage(3, 0))
    for ledger in (again._ledger, Ledger(tmp_path, "next")):
        assert ledger.max_dollars == 109 and ledger.spent()["m"].repeated_requests == 1


def test_a_governor_that_is_started_anew_knows_the_requests_in_flight(tmp_path: Path) -> None:
    ticket = reserve(governor(tmp_path), Usage(10, 0))
    anew = governor(tmp_path)
    assert anew._ledger.reserved == 10
    other = reserve(anew, Usage(10, 0))
    settle(anew, ticket, Usage(4, 0))
    assert other != ticket and (anew._ledger.max_dollars, anew._ledger.reserved) == (4, 10)


def test_a_request_waits_for_those_in_flight_before_it_is_refused(tmp_path: Path) -> None:
    async def main() -> Any:
        running = governor(tmp_path, budget=100)
        first = await reserve_one(running, "m", Usage(80, 0))
        second = asyncio.ensure_future(reserve_one(running, "m", Usage(60, 0)))
        third = asyncio.ensure_future(reserve_one(running, "n", Usage(60, 0)))
        await asyncio.sleep(0.2)
        assert not second.done() and not third.done()
        await settle_one(running, str(first), Settlement(Usage(30, 0)))
        await asyncio.wait({second, third}, return_when=asyncio.FIRST_COMPLETED)
        done, waiting = (second, third) if second.done() else (third, second)
        await settle_one(running, str(await done), Settlement(Usage(20, 0)))
        return await asyncio.wait_for(waiting, 5), running._ledger.max_dollars

    assert simulate(main()) == (Refused(50.0, 60.0), 50.0)


def test_requests_that_may_be_sent_do_not_wait_for_others_of_their_group(tmp_path: Path) -> None:
    """Otherwise the second one would wait forever for the settlement of the first one."""

    async def main() -> Any:
        running = governor(tmp_path, budget=100)
        group = running.reserve("s", "m", [Usage(80, 0), Usage(60, 0)])
        return await asyncio.wait_for(group, 5)

    assert len(simulate(main())) == 1


@pytest.mark.parametrize("restarts", [False, True], ids=["actor died", "governor died"])
def test_a_request_whose_process_died_does_not_hold_up_the_others(
    restarts: bool, tmp_path: Path
) -> None:
    async def main() -> Any:
        running = governor(tmp_path, budget=100)
        await reserve_one(running, "m", Usage(80, 0))
        if restarts:
            running = governor(tmp_path, budget=100)
        waiting = reserve_one(running, "m", Usage(60, 0))
        refused = await asyncio.wait_for(waiting, 2 * TARIFFS["m"].lasts)
        assert asyncio.get_running_loop().time() > TARIFFS["m"].lasts
        return refused, running._ledger.spent()["m"].unknown_requests

    assert simulate(main()) == (Refused(80.0, 60.0), 1)


def test_the_budget_is_for_all_runs_and_can_be_raised(tmp_path: Path) -> None:
    first = governor(tmp_path, "first", budget=100)
    settle(first, reserve(first, Usage(60, 0)), Usage(60, 0))
    most = Usage(60, 0)
    second = governor(tmp_path, "second", budget=100)
    assert asyncio.run(reserve_one(second, "m", most)) == Refused(60.0, 60.0)
    assert isinstance(asyncio.run(reserve_one(governor(tmp_path, "third", 120), "m", most)), str)


# --- what the replies of an endpoint cost ---------------------------------------------------------


def pay(folder: Path, *replies: Answer, **settings: Any) -> tuple[Spent, list[dict[str, Any]]]:
    """Sends one metered request; returns what was spent and the bodies of all attempts."""
    running = governor(folder)

    async def main(url: str) -> None:
        METER.set(Meter(running, "s", "m"))
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=url, **settings))
        with suppress(RowError, Temporary):
            await engine.answer([user("Hello")], Sampling(0.7, 0.9, 8))

    def reply(number: int, body: dict[str, Any]) -> Answer:
        return replies[min(number, len(replies) - 1)]

    with endpoint(reply) as server:
        asyncio.run(main(server.url))
    assert running._ledger.reserved == 0
    return running._ledger.spent()["m"], server.bodies


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(endpoints, "LONGEST_DELAY", 0.002)


PAID = Spent(requests=1, input_tokens=5, output_tokens=3, dollars=5.3)
CACHED = completion() | {
    "usage": {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
}


def usage(**counts: Any) -> Answer:
    return Answer(200, completion() | {"usage": completion()["usage"] | counts})


FILTERED = Answer(200, completion(None, "content_filter"))
NO_USAGE = Answer(200, {**completion(), "usage": None})
CUT = Answer(200, completion(), {"Content-Length": "9999"})


@pytest.mark.parametrize(
    ("replies", "spent", "unknown"),
    [
        ([GOOD], PAID, 0),
        ([Answer(200, CACHED)], Spent(1, 5, 4, 3, 3.3), 0),
        ([error(500), error(429), GOOD], PAID, 0),
        ([FILTERED], PAID, 0),
        ([Answer(200, completion(None)), GOOD], Spent(2, 10, 0, 6, 10.6), 0),
        ([NO_USAGE], Spent(), 1),
        ([CUT, GOOD], PAID, 1),
        ([HTML, GOOD], PAID, 1),
        ([error(400, "odd")], Spent(), 0),
        ([error(504), GOOD], PAID, 1),
        ([usage(prompt_tokens=10**400)], Spent(), 1),
        ([usage(completion_tokens=-3)], Spent(), 1),
        ([usage(prompt_tokens=float("nan"))], Spent(), 1),
        ([usage(prompt_tokens_details={"cached_tokens": 99})], Spent(1, 5, 5, 3, 2.8), 0),
    ],
)
def test_the_cost_of_a_reply(
    replies: list[Answer], spent: Spent, unknown: int, tmp_path: Path
) -> None:
    actual, bodies = pay(tmp_path, *replies)
    price = TARIFFS["m"].price
    assert price is not None
    most = price.most(most_tokens(bodies[0], "m"))
    expected = spent + Spent(unknown_requests=unknown, unknown_dollars=unknown * most)
    assert vars(actual) == pytest.approx(vars(expected))


def test_a_request_that_was_not_sent_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = governor(tmp_path)
    monkeypatch.setattr(endpoints, "RETRIES", 1)

    async def main() -> None:
        METER.set(Meter(running, "s", "m"))
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url="http://127.0.0.1:9/v1"))
        await engine.answer([user("Hello")], Sampling(0.7, 0.9, 8))

    with pytest.raises(Temporary, match="no reply"):
        asyncio.run(main())
    assert running._ledger.spent() == {"m": Spent()}


def test_a_request_that_could_exceed_the_budget_stops_the_run(tmp_path: Path) -> None:
    async def main() -> None:
        await Meter(governor(tmp_path, budget=2), "s", "m").reserve(Usage(2, 1))

    with pytest.raises(StopRun, match=r"up to \$2.10, and \$0.00 has been spent; raise budget_usd"):
        asyncio.run(main())


def test_a_request_that_waits_when_the_stage_stops_is_not_sent(tmp_path: Path) -> None:
    """A reservation that is granted later is given back."""

    async def main() -> float:
        running = governor(tmp_path, budget=100)
        stopping = asyncio.Event()
        STOPPING.set(stopping)
        first = await reserve_one(running, "m", Usage(80, 0))
        waiting = asyncio.ensure_future(Meter(running, "s", "m").reserve(Usage(60, 0)))
        await asyncio.sleep(0.05)
        stopping.set()
        with pytest.raises(Temporary, match="the stage stopped"):
            await waiting
        await settle_one(running, str(first), Settlement(Usage(30, 0)))
        await asyncio.sleep(0.2)
        return running._ledger.max_dollars + running._ledger.reserved

    assert simulate(main()) == 30


def test_a_reservation_that_comes_as_its_row_is_cancelled_is_given_back(tmp_path: Path) -> None:
    class Cancelling(Governor):
        async def reserve(self, *request: Any) -> list[str | Refused]:
            asyncio.get_running_loop().call_soon(row.cancel)
            return await super().reserve(*request)

    async def main() -> float:
        nonlocal row
        running = Cancelling(tmp_path, "run", TARIFFS, budget=100)
        row = asyncio.ensure_future(Meter(running, "s", "m").reserve(Usage(80, 0)))
        await asyncio.wait({row})
        await asyncio.sleep(0.05)
        assert row.cancelled() and running._ledger.spent() == {"m": Spent()}
        return running._ledger.reserved

    row: asyncio.Future[str]
    assert simulate(main()) == 0


def test_a_settlement_is_not_lost_if_its_row_is_cancelled(tmp_path: Path) -> None:
    """The second row's settlement waits for the call that settles the first one."""

    class Slow(Governor):
        async def settle(self, ends: Any) -> list[bool]:
            await asyncio.sleep(0.05)
            return await super().settle(ends)

    async def main() -> Any:
        running = Slow(tmp_path, "run", TARIFFS, budget=1000)
        meter = Meter(running, "s", "m")
        tickets = [await meter.reserve(Usage(80, 0)) for _ in range(2)]
        ends = []
        for ticket in tickets:
            ends.append(asyncio.create_task(meter.settle(ticket, Settlement(Usage(30, 0)))))
            await asyncio.sleep(0.01)
        ends[1].cancel()
        await asyncio.wait(ends)
        await asyncio.sleep(0.2)
        assert ends[1].cancelled()
        return running._ledger.max_dollars, running._ledger.reserved

    assert simulate(main()) == (60, 0)


BODY = {"max_tokens": 1, "messages": []}


def test_a_request_is_reserved_once_it_has_a_slot(tmp_path: Path) -> None:
    """Otherwise it would be sent later than the limits per minute assume. The slot is freed when
    the reply arrives, before the cost is settled."""

    async def main() -> None:
        running = governor(tmp_path)
        METER.set(Meter(running, "s", "m"))
        REQUESTS.set(asyncio.Semaphore(1))
        async with Attempt(BODY) as first:
            one, other = running._ledger.reserved, Attempt(BODY)
            second = asyncio.ensure_future(other.__aenter__())
            await asyncio.sleep(0.1)
            assert not second.done() and running._ledger.reserved == one
            first.replied(200, "{}")
            await asyncio.wait_for(second, 5)
            assert running._ledger.reserved == 2 * one
        await other.__aexit__(None, None, None)

    simulate(main())


@pytest.mark.parametrize(
    "cause", ["over budget", "stage stops", "cancelled", "no reply", "replied"]
)
def test_a_slot_is_free_after_every_end_of_an_attempt(cause: str, tmp_path: Path) -> None:
    async def attempt() -> None:
        async with Attempt(BODY) as running:
            if cause == "replied":
                running.replied(200, "{}")
            raise Unavailable("no reply")

    async def main() -> bool:
        METER.set(Meter(governor(tmp_path, budget=0 if cause == "over budget" else None), "s", "m"))
        REQUESTS.set(slots := asyncio.Semaphore(1))
        STOPPING.set(stopping := asyncio.Event())
        if cause == "stage stops":
            stopping.set()
        task = asyncio.ensure_future(attempt())
        if cause == "cancelled":
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        ends = {"over budget": StopRun, "stage stops": Temporary, "cancelled": None}
        assert task.cancelled() or isinstance(task.exception(), ends.get(cause) or Unavailable)
        assert task.cancelled() == (cause == "cancelled")
        return slots._value == 1

    assert asyncio.run(main())


@pytest.mark.parametrize("after", [None, 7.0])
def test_a_rate_limit_is_settled_with_the_seconds_to_wait(after: float | None) -> None:
    attempt = Attempt({})
    attempt.replied(429, "{}")
    settled = attempt.settlement(Unavailable("busy", after, rate_limited=True))
    assert settled == Settlement(Usage(), limited=True, after=after)


@pytest.mark.parametrize("text", ["a word", "ä 中文 🙂", 'quotes " and \\ and\nlines', "ﷺ" * 9])
def test_no_tokenizer_counts_more_tokens_than_are_reserved(text: str, tiny_model: Path) -> None:
    from zephyr_ray.chat import ChatFormat
    from zephyr_ray.models.checks import load_chat_format

    chat = load_chat_format(tiny_model, ChatFormat.to_ask)
    messages = [user(text), {"role": "assistant", "content": text}, user(text)]
    most = most_tokens({"messages": messages, "max_tokens": 7, "n": 3}, "m")
    assert len(chat.prompt(messages)) <= most.input and most.output == 21


def test_the_most_that_a_request_can_cost() -> None:
    """Each choice may reach the token limit, and the higher input price applies."""
    one, three = ({"messages": [], "max_tokens": 7, "n": n} for n in (1, 3))
    size = len('{"messages": [], "max_tokens": 7, "n": 3}')
    assert most_tokens(three, "m") == Usage(size + 256, 21)
    assert most_tokens(one, "m").output == 7
    assert Price(2e6, 0, 3e6).most(Usage(5, 9)) == 15
    assert Price(3e6, 0, 2e6).most(Usage(5, 9)) == 15


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens": None}, {"max_tokens": -1}, {"max_tokens": 9, "max_completion_tokens": 0}],
)
def test_a_request_without_a_limit_of_tokens_is_not_sent(limits: dict[str, Any]) -> None:
    with pytest.raises(StopRun, match="model 'm': its parameters set no positive max_tokens"):
        most_tokens({"messages": [], **limits}, "m")


def test_parameters_without_a_limit_of_tokens_are_refused_before_the_run() -> None:
    model = OpenAISettings(
        model="m", base_url="http://127.0.0.1:9", price=(1, 1), parameters={"max_tokens": -1}
    )
    with pytest.raises(StopRun, match="set no positive max_tokens"):
        model.preflight()
