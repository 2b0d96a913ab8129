"""Admits the requests of all actors of a run, within each account's rate limits and the budget."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from zephyr_ray.engines.ledger import Ledger, Spent
from zephyr_ray.engines.pace import Account, Taken
from zephyr_ray.engines.tariff import Tariff, Usage

POLL_SECONDS = 0.05
"""Maximum seconds between two checks of limits and budget, which settlements change."""

LOOK_SECONDS = 5.0
"""Minimum seconds between two checks for requests whose process died."""


@dataclass(frozen=True)
class Refused:
    """The refusal of a request that could exceed the budget."""

    spent: float
    request: float
    """The most that the request can cost, in dollars."""


@dataclass(frozen=True)
class Settlement:
    """The end of an attempt at a request."""

    usage: Usage | None
    """Tokens to pay for; None if they are unknown."""
    limited: bool = False
    """Whether the server refused it for its rate limit."""
    after: float | None = None
    """Seconds to wait, as stated with that refusal."""


class Governor:
    """Admits requests one by one; one object, or one Ray actor, per run. Its methods are called
    concurrently, in one event loop."""

    def __init__(
        self, folder: Path, run: str, tariffs: dict[str, Tariff], budget: float | None = None
    ):
        """`folder` holds the recipe's ledger; `tariffs` are those of its models by name; `budget`
        is the most dollars that all runs of the recipe may pay."""
        self._ledger, self._budget, self._tariffs = Ledger(folder, run), budget, tariffs
        self._accounts = {
            name: Account([t for t in tariffs.values() if t.account == name])
            for name in {tariff.account for tariff in tariffs.values()}
        }
        self._turns = {name: asyncio.Lock() for name in self._accounts}
        self._taken: dict[str, tuple[Account, Taken | None]] = {}
        """The account of each request in flight, and its tokens there."""
        self._seen: dict[str, float] = {}
        """When each request was first seen in flight while others waited for the budget."""
        self._next_look = 0.0

    async def reserve(self, stage: str, model: str, requests: list[Usage]) -> list[str | Refused]:
        """Waits until the first request may be sent; `requests` holds the maximum tokens of each.
        Returns its ticket and those of the following ones that may be sent at once. A ticket is
        Refused if its request could exceed the budget whatever the requests in flight cost."""
        tickets: list[str | Refused] = []
        async with self._turns[self._tariffs[model].account]:
            for most in requests:
                while not isinstance(ticket := self._admit(stage, model, most), str | Refused):
                    if tickets:
                        return tickets
                    if ticket is None:
                        self._end_lost()
                    await asyncio.sleep(min(ticket or POLL_SECONDS, POLL_SECONDS))
                tickets.append(ticket)
        return tickets

    def _admit(self, stage: str, model: str, most: Usage) -> str | Refused | float | None:
        """Returns the ticket of a request if it may be sent now, otherwise the seconds until its
        account's limits allow it, or None if it waits for the budget."""
        tariff = self._tariffs[model]
        account = self._accounts[tariff.account]
        dollars = tariff.price.most(most) if tariff.price else 0.0
        spent = self._ledger.max_dollars
        if self._budget is not None and spent + dollars > self._budget:
            return Refused(spent, dollars)
        if delay := account.delay(_now(), most):
            return delay
        if not self._fits(spent + dollars):
            return None
        taken = account.take(_now(), most)
        ticket = self._ledger.reserve(stage, model, dollars, tariff.price)
        self._taken[ticket] = account, taken
        return ticket

    async def settle(self, ends: list[tuple[str, Settlement]]) -> list[bool]:
        """Ends attempts at requests by their tickets. Returns False for those that are already
        settled, because a batch may be collected twice."""
        return [self._settle(ticket, end) for ticket, end in ends]

    def _settle(self, ticket: str, end: Settlement) -> bool:
        if not (reservation := self._ledger.find(ticket)):
            return False
        tariff, usage = self._tariffs.get(reservation.model), end.usage
        price = reservation.price or (tariff and tariff.price)
        if usage and usage.tokens and reservation.dollars and not price:
            usage = None  # an earlier run paid for it, at a price that is not known
        dollars = price.dollars(usage) if price and usage else 0.0
        if not reservation.price:  # an earlier version's, for which today's price may be too high
            dollars = min(dollars, reservation.dollars)
        self._ledger.settle(ticket, usage, dollars)
        if ticket in self._taken:  # otherwise it was sent before this process started
            account, taken = self._taken.pop(ticket)
            account.settle(taken, end.usage)
            if end.limited:
                account.limited(_now(), end.after)
        return True

    async def spent(self, stage: str | None = None) -> dict[str, Spent]:
        """Returns what was spent by model: for one stage, or for all runs of the recipe."""
        return self._ledger.spent(stage)

    def _end_lost(self) -> None:
        """Settles requests that have been in flight for longer than is possible: their process
        died, and others would wait forever for their settlement."""
        if (now := _now()) < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        open_ones = self._ledger.in_flight()
        self._seen = {ticket: self._seen.get(ticket, now) for ticket in open_ones}
        for ticket, since in self._seen.items():
            tariff = self._tariffs.get(open_ones[ticket])
            if now > since + (tariff.lasts if tariff else 0):
                self._settle(ticket, Settlement(None))

    def _fits(self, dollars: float) -> bool:
        return self._budget is None or dollars + self._ledger.reserved <= self._budget


def _now() -> float:
    return asyncio.get_running_loop().time()
