"""Holds back a request until it has a slot and, if its model has limits or a price, until the
governor of the run admits it."""

import asyncio
import json
from contextvars import ContextVar
from functools import partial
from typing import Any, Self

from zephyr_ray.engines.governor import Refused, Settlement
from zephyr_ray.engines.grouping import Grouped
from zephyr_ray.engines.replies import NotSent, Unavailable
from zephyr_ray.engines.tariff import Usage, read_usage
from zephyr_ray.errors import Temporary
from zephyr_ray.formatting import dollars
from zephyr_ray.models.contract import REQUESTS, STOPPED, STOPPING, StopRun, check_stopping

TEMPLATE_TOKENS = 256
"""Tokens that a server's chat template may add to a request, such as a default system prompt."""
FREE = Usage()
LIMITS = ("max_tokens", "max_completion_tokens")
"""Parameters that state the maximum tokens per answer."""

GATEWAY_TIMEOUTS = (504, 524)
"""Statuses of a gateway that gave up on the server, which may still answer and charge."""


class Meter:
    """A client of the governor for one model in one stage. Groups the calls of waiting rows,
    because each call of an actor costs more CPU time than a request."""

    def __init__(self, governor: Any, stage: str, model: str):
        """`governor` is a `Governor`, or the Ray actor that holds it."""
        self.governor, self.stage, self.model = governor, stage, model
        self._reserve = Grouped[Usage, str | Refused](
            partial(self._call, "reserve", stage, model), self._give_back
        )
        self._settle = Grouped[tuple[str, Settlement], bool](partial(self._call, "settle"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Meter, (self.governor, self.stage, self.model)

    async def reserve(self, most: Usage) -> str:
        """Waits until a request that uses at most these tokens may be sent; returns its ticket.
        Raises StopRun if it could exceed the budget, Temporary if the stage stops meanwhile."""
        stopping: asyncio.Future[Any] = asyncio.ensure_future(
            (STOPPING.get() or asyncio.Event()).wait()
        )
        call: asyncio.Future[Any] = self._reserve.put(most)
        try:
            await asyncio.wait({call, stopping}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not call.cancel() and not call.exception():
                self._give_back(call.result())
            raise
        finally:
            stopping.cancel()
        if call.cancel():
            raise Temporary(STOPPED)
        ticket = call.result()
        if isinstance(ticket, Refused):
            raise StopRun(
                f"the next request to model '{self.model}' could exceed budget_usd: it may cost up "
                f"to {dollars(ticket.request)}, and {dollars(ticket.spent)} has been spent; raise "
                "budget_usd, then run again"
            )
        return str(ticket)

    async def settle(self, ticket: str, end: Settlement) -> None:
        """Ends an attempt at a request, even if the row that waits for it is cancelled."""
        await asyncio.shield(self._settle.put((ticket, end)))

    async def _call(self, name: str, *arguments: Any) -> Any:
        method = getattr(self.governor, name)
        return await getattr(method, "remote", method)(*arguments)

    def _give_back(self, ticket: str | Refused) -> None:
        """Settles a reservation that was granted after its request had been given up."""
        if isinstance(ticket, str):
            self._settle.put((ticket, Settlement(FREE)))


METER: ContextVar[Meter | None] = ContextVar("METER", default=None)
"""The meter of the request in this context; None if its model has neither limits nor a price."""


class Attempt:
    """One attempt at a request: waits until it may be sent, and settles its cost at the end. Raises
    Temporary if the stage stops meanwhile, and the errors of `Meter.reserve` and `most_tokens`."""

    def __init__(self, body: dict[str, Any]):
        self._body, self._meter = body, METER.get()
        self._slots = REQUESTS.get()
        self._ticket = ""
        self._reply: tuple[int, str] | None = None

    async def __aenter__(self) -> Self:
        # The slot comes first: a request that waited for one after its reservation would be sent
        # later than the limits per minute assume.
        if self._slots:
            await self._slots.acquire()
        try:
            check_stopping()
            if self._meter:
                self._ticket = await self._meter.reserve(most_tokens(self._body, self._meter.model))
        except BaseException:
            self._free_slot()
            raise
        return self

    def replied(self, status: int, text: str) -> None:
        """Records the reply, and gives the slot to another request."""
        self._reply = status, text
        self._free_slot()

    async def __aexit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self._free_slot()
        if self._meter:
            await self._meter.settle(self._ticket, self.settlement(error))

    def _free_slot(self) -> None:
        if self._slots:
            self._slots.release()
            self._slots = None

    def settlement(self, error: BaseException | None) -> Settlement:
        """Returns the cost of the attempt, and whether `error`, which ended it, is a rate limit."""
        usage = FREE if isinstance(error, NotSent) else self._usage()
        if isinstance(error, Unavailable) and error.rate_limited:
            return Settlement(usage, limited=True, after=error.after)
        return Settlement(usage)

    def _usage(self) -> Usage | None:
        """Returns the tokens to pay for after a request was sent; None if unknown, as after a
        gateway's timeout. Other error replies cost nothing."""
        if self._reply is None:
            return None
        status, text = self._reply
        if status >= 300:
            return None if status in GATEWAY_TIMEOUTS else FREE
        try:
            return read_usage(json.loads(text))
        except (ValueError, RecursionError):
            return None


def most_tokens(body: dict[str, Any], model: str) -> Usage:
    """Returns the most tokens that a chat completion can use: each input token takes at least one
    byte of the request's JSON. Raises StopRun if the request does not limit its answer."""
    limits = [value for name in LIMITS if (value := body.get(name)) is not None]
    # Some servers take -1 to mean no limit.
    if not limits or not all(type(limit) is int and limit > 0 for limit in limits):
        raise StopRun(
            f"model '{model}': its parameters set no positive max_tokens, without which the cost "
            "of a request has no bound; remove that parameter, or the model's price and limits"
        )
    size = len(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
    return Usage(size + TEMPLATE_TOKENS, max(limits) * int(body.get("n") or 1))
