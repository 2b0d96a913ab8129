"""Fakes a provider of an OpenAI-compatible API: faults, rate limits, prices, batches, and a bill.

    with provider(Behavior(faults=0.1)) as server: ...        in this process
    python tests/fake_provider.py --port 8900 --faults 0.1    in its own; prints its base URL

There, GET /bill returns the bill, and POST /hold/N holds requests back after N answers.

Answers at temperature 0 and faults are functions of the request and of how often it was sent, so
they do not depend on the order in which requests arrive.
"""

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from fake_answers import cached_tokens, choice, prompt_tokens
from fake_answers import count_tokens as count
from fake_batches import Batches

Body = dict[str, Any]
FAULTS = ("429", "429 with retry-after", "500", "slow", "cut", "bad JSON")
BILLED_FAULTS = ("cut", "bad JSON")
"""Faults that break the reply after its answer was generated, which is billed."""


@dataclass(frozen=True)
class Behavior:
    """How a provider behaves."""

    seed: int = 0
    faults: float = 0.0
    """Share of requests that get one of FAULTS."""
    latency: float = 0.0
    """Seconds per answer."""
    slow: float = 1.0
    """Additional seconds of a slow answer."""
    retry_after: float = 0.2
    """Seconds in the Retry-After header of the 429 fault that has one."""
    rpm: float | None = None
    tpm: float | None = None
    """Maximum requests, and prompt and answer tokens, per minute; a burst is one second's share."""
    refuses: tuple[str, ...] = ()
    """Parameters that the provider does not support."""
    most_choices: int = 128
    """Maximum choices per request; the provider omits the others without an error."""
    price: tuple[float, float, float] = (1.0, 3.0, 0.5)
    """Dollars per million tokens: prompt, answer, cached prompt."""
    batch_seconds: float = 0.1
    batch_ends: tuple[str, ...] = ()
    queue: int = 50_000
    """See `Batches`."""


@dataclass
class Bill:
    """A provider's counts of one model's requests."""

    requests: int = 0
    """Requests that arrived, refused ones included."""
    answers: int = 0
    """Requests that were answered completely."""
    repeated: int = 0
    """Answers to requests that had already been answered; included in `answers`."""
    repeated_dollars: float = 0.0
    """Price of the repeated answers; included in `dollars`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Included in `prompt_tokens`."""
    completion_tokens: int = 0
    dollars: float = 0.0
    """Price of complete answers."""
    lost_dollars: float = 0.0
    """Price of answers whose replies broke; clients cannot know it exactly."""
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, usage: Body, dollars: float, repeated: bool) -> None:
        """Counts a complete answer."""
        self.answers += 1
        self.prompt_tokens += usage["prompt_tokens"]
        self.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
        self.completion_tokens += usage["completion_tokens"]
        self.dollars += dollars
        if repeated:
            self.repeated += 1
            self.repeated_dollars += dollars


class Limit:
    """A rate per minute, enforced as a bucket that holds one second's share."""

    def __init__(self, per_minute: float):
        self._rate = per_minute / 60
        self._level, self._filled = max(1.0, self._rate), time.monotonic()

    def seconds_until(self) -> float:
        """Returns how long a request must wait, 0 if it may pass."""
        now = time.monotonic()
        self._level = min(max(1.0, self._rate), self._level + (now - self._filled) * self._rate)
        self._filled = now
        return 0.0 if self._level >= 1 else (1 - self._level) / self._rate

    def take(self, amount: float) -> None:
        self._level -= amount


class Provider:
    """The state of a running provider."""

    def __init__(self, behavior: Behavior):
        self.behavior, self.url = behavior, ""
        self.bills: dict[str, Bill] = {}
        """Bills by model; "MODEL (batch)" for requests of batches."""
        self.delivered: Counter[str] = Counter()
        """Choices delivered per request."""
        self.bodies: list[Body] = []
        self.batches = Batches(
            self._answer_line, behavior.batch_seconds, behavior.batch_ends, behavior.queue
        )
        self._most = sys.maxsize
        """Answers after which requests are held back."""
        self._sent: Counter[str] = Counter()
        self._limits = [
            (Limit(rate), by_tokens)
            for rate, by_tokens in ((behavior.rpm, False), (behavior.tpm, True))
            if rate
        ]

    def application(self) -> web.Application:
        application = web.Application(client_max_size=2**30)
        application.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.get("/bill", self._show_bill),
                web.post("/hold/{answers}", self._hold),
                *self.batches.routes(),
            ]
        )
        return application

    @property
    def dollars(self) -> float:
        """The price of all answers, including those whose replies broke."""
        return sum(bill.dollars + bill.lost_dollars for bill in self.bills.values())

    def answer(self, body: Body, batched: bool = False) -> tuple[int, Body, str | None]:
        """Returns the status and JSON of the reply to one request, and its fault; updates the
        bill."""
        model = str(body.get("model"))
        bill = self.bills.setdefault(f"{model} (batch)" if batched else model, Bill())
        bill.requests += 1
        self.bodies.append(body)
        if refused := [name for name in self.behavior.refuses if name in body]:
            return 400, _unsupported(refused[0]), None
        key = json.dumps({**body, "n": None}, sort_keys=True)
        self._sent[key] += 1
        rng = random.Random(f"{self.behavior.seed} {key} {self._sent[key]}")
        fault = rng.choice(FAULTS) if rng.random() < self.behavior.faults else None
        if fault in FAULTS[:3]:
            bill.faults[fault] += 1
            status = 500 if fault == "500" else 429
            return status, error("Try again.", code=str(status)), fault
        wanted = min(body.get("n") or 1, self.behavior.most_choices)
        draws = [f"{self._sent[key]} {number}" for number in range(wanted)]
        choices = [choice(body, draw) | {"index": i} for i, draw in enumerate(draws)]
        usage = {
            "prompt_tokens": prompt_tokens(body),
            "completion_tokens": sum(count(c["message"]["content"]) for c in choices),
            "prompt_tokens_details": {"cached_tokens": cached_tokens(body)},
        }
        if not batched and (seconds := self._wait(usage)):
            bill.faults["limit"] += 1
            return 429, error(f"Rate limit; wait {seconds} s.", code="rate_limit_exceeded"), None
        if fault:
            bill.faults[fault] += 1
        dollars = self._dollars(usage) * (0.5 if batched else 1)
        if fault in BILLED_FAULTS:
            bill.lost_dollars += dollars
        else:
            bill.add(usage, dollars, repeated=self.delivered[key] > 0)
            self.delivered[key] += len(choices)
        reply = {"id": f"chatcmpl-{len(self.bodies)}", "object": "chat.completion"}
        return 200, {**reply, "model": model, "choices": choices, "usage": usage}, fault

    def _answer_line(self, body: Body) -> tuple[int, Body]:
        """Answers a request of a batch; a fault that would break the reply becomes status 500."""
        status, reply, fault = self.answer(body, batched=True)
        return (500, error("It broke.")) if fault in BILLED_FAULTS else (status, reply)

    def _wait(self, usage: Body) -> float:
        """Returns how long a request must wait for the rate limits; if 0, counts it in them."""
        if seconds := max((limit.seconds_until() for limit, _ in self._limits), default=0.0):
            return seconds
        for limit, by_tokens in self._limits:
            tokens = usage["prompt_tokens"] + usage["completion_tokens"]
            limit.take(tokens if by_tokens else 1)
        return 0.0

    def _dollars(self, usage: Body) -> float:
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        amounts = (usage["prompt_tokens"] - cached, usage["completion_tokens"], cached)
        return sum(a * p for a, p in zip(amounts, self.behavior.price, strict=True)) / 1e6

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        while sum(bill.answers for bill in self.bills.values()) >= self._most:
            await asyncio.sleep(0.01)
        status, reply, fault = self.answer(body)
        if status == 200:
            slow = self.behavior.slow if fault == "slow" else 0
            await asyncio.sleep(self.behavior.latency + slow)
        headers = {}
        if fault == "429 with retry-after":
            headers["Retry-After"] = str(self.behavior.retry_after)
        text = json.dumps(reply)
        if fault == "bad JSON":
            text = text[: len(text) // 2] + "}"
        response = web.Response(
            text=text, status=status, headers=headers, content_type="application/json"
        )
        if fault == "cut":
            return await _cut(request, text)
        return response

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async def _show_bill(self, request: web.Request) -> web.Response:
        return web.json_response({model: vars(bill) for model, bill in self.bills.items()})

    async def _hold(self, request: web.Request) -> web.Response:
        self._most = int(request.match_info["answers"])
        return web.Response()


def error(message: str, **more: Any) -> Body:
    return {"error": {"message": message, **more}}


def _unsupported(name: str) -> Body:
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    return error(message, param=name, code="unsupported_parameter")


async def _cut(request: web.Request, text: str) -> web.StreamResponse:
    """Sends half of a reply, then closes the connection."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(text.encode())
    await response.prepare(request)
    await response.write(text.encode()[: len(text) // 2])
    if request.transport:
        request.transport.close()
    return response


async def _start(running: Provider, port: int) -> web.AppRunner:
    runner = web.AppRunner(running.application(), access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    running.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    return runner


@contextmanager
def provider(behavior: Behavior | None = None) -> Iterator[Provider]:
    """Runs a provider in a thread."""
    running, loop = Provider(behavior or Behavior()), asyncio.new_event_loop()
    runner = loop.run_until_complete(_start(running, port=0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="by default, a free one")
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--rpm", type=float)
    parser.add_argument("--tpm", type=float)
    options = vars(parser.parse_args())
    port = options.pop("port")

    async def serve() -> None:
        running = Provider(Behavior(**options))
        await _start(running, port)
        print(running.url, flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
