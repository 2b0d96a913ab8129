"""Records what the runs of a recipe paid; no cost goes unrecorded even if a process is killed.

    <storage>/spending/<recipe>/<run>.jsonl

Each request has two entries: a reservation of its maximum cost before it is sent, and afterwards a
settlement with the usage that the server reports. If the usage is not reported, or no reply
arrives, the reserved amount is taken as the cost. The same holds if the process is killed before
the settlement; that request is sent again and may be paid for twice.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from zephyr_ray.engines.tariff import Price, Usage
from zephyr_ray.store import Journal

SPENDING = "spending"
"""Folder of all ledgers, below the storage folder."""
PAID = "paid/"
"""Prefix of the cost counts in a manifest: paid/<model>/<field of Spent>."""


def ledger_folder(storage: Path, recipe: str) -> Path:
    return storage / SPENDING / recipe


def paid_dollars(counts: Mapping[str, float]) -> float:
    """Returns an upper bound on the dollars that a stage paid, from the counts of its manifest."""
    return sum(
        v for name, v in counts.items() if name.startswith(PAID) and name.endswith("dollars")
    )


def spent_before(storage: Path, recipe: str) -> float:
    """Returns an upper bound on the dollars that earlier runs of a recipe paid."""
    folder = ledger_folder(storage, recipe)
    return Ledger(folder).max_dollars if folder.is_dir() else 0.0


def spent_besides(storage: Path, recipe: str, stages: Collection[str]) -> dict[str, "Spent"]:
    """Returns what the runs of a recipe spent, by model, except on these stages (names of their
    artifacts' folders); nothing if there is no ledger."""
    folder = ledger_folder(storage, recipe)
    return Ledger(folder).spent(besides=stages) if folder.is_dir() else {}


@dataclass
class Spent:
    """The cost and the tokens of a group of requests."""

    requests: int = 0
    """Requests that were settled with the server's token counts."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """Part of `input_tokens`."""
    output_tokens: int = 0
    dollars: float = 0.0
    """Dollars paid for `requests`."""
    unknown_requests: int = 0
    """Requests whose cost is not known."""
    unknown_dollars: float = 0.0
    """Upper bound on the dollars paid for `unknown_requests`."""
    repeated_requests: int = 0
    """Part of `unknown_requests`: requests in flight when a process was killed, which may be paid
    for twice."""

    @property
    def max_dollars(self) -> float:
        """Upper bound on the dollars paid for all requests."""
        return self.dollars + self.unknown_dollars

    def settle(self, reserved: float, tokens: list[int] | None, dollars: float) -> None:
        """Counts a request by its (input, cached input, output) tokens: None if they are unknown,
        all 0 if the server did not answer."""
        if tokens is None:
            self.unknown_requests += 1
            self.unknown_dollars += reserved
            return
        input_tokens, cached, output = tokens
        self.requests += any(tokens)
        self.input_tokens += input_tokens
        self.cached_tokens += cached
        self.output_tokens += output
        self.dollars += dollars

    def __add__(self, other: "Spent") -> "Spent":
        mine, theirs = asdict(self), asdict(other)
        return Spent(**{name: value + theirs[name] for name, value in mine.items()})


@dataclass(frozen=True)
class Reservation:
    """The maximum cost of a request."""

    stage: str
    model: str
    dollars: float
    price: Price | None
    """The price of its tokens; None if it has none, or an earlier version wrote no price."""


class Ledger:
    """The payments of all runs of a recipe."""

    def __init__(self, folder: Path, run: str = ""):
        """Reads the ledger; a named run can also write to it. An open reservation of another run
        was never settled, because that run was killed."""
        self._run, self._count = run, 0
        self._open: dict[str, Reservation] = {}
        self._early: dict[str, dict[str, Any]] = {}
        """Settlements that were read before their reservations, from the file of a later run."""
        self._spent: dict[tuple[str, str], Spent] = {}
        """By stage and model."""
        self.reserved = 0.0
        """Dollars of open reservations of this run."""
        self._orphaned = 0.0
        """Dollars of open reservations of other runs."""
        self._journal = Journal(folder, writer=run or None)
        for entry in self._journal.read_new():
            self._apply(entry)

    @property
    def max_dollars(self) -> float:
        """Upper bound on the dollars paid, without the requests in flight."""
        return self._orphaned + sum(spent.max_dollars for spent in self._spent.values())

    def spent(self, stage: str | None = None, besides: Collection[str] = ()) -> dict[str, Spent]:
        """Returns what was spent, by model, for one stage or for all, except those in `besides`."""
        parts = list(self._spent.items())
        parts += [
            (
                (r.stage, r.model),
                Spent(unknown_requests=1, unknown_dollars=r.dollars, repeated_requests=1),
            )
            for ticket, r in self._open.items()
            if not self._is_own(ticket)
        ]
        by_model: dict[str, Spent] = {}
        for (entry_stage, model), spent in parts:
            if stage in (None, entry_stage) and entry_stage not in besides:
                by_model[model] = by_model.get(model, Spent()) + spent
        return by_model

    def reserve(self, stage: str, model: str, dollars: float, price: Price | None = None) -> str:
        """Writes a reservation; returns its ticket."""
        ticket = f"{self._run}-{self._count}"
        entry = {"reserve": ticket, "stage": stage, "model": model, "usd": dollars}
        # A later run, in which the model has another name or price, may learn what it cost.
        self._write(entry | ({"price": astuple(price)} if price else {}))
        return ticket

    def find(self, ticket: str) -> Reservation | None:
        """Returns an open reservation; None if it is not open."""
        return self._open.get(ticket)

    def in_flight(self) -> dict[str, str]:
        """Returns the models of this run's open reservations by their tickets."""
        return {t: r.model for t, r in self._open.items() if self._is_own(t)}

    def settle(self, ticket: str, usage: Usage | None, dollars: float) -> None:
        """Writes what a request cost; if `usage` is None, the reserved amount is taken as the
        cost."""
        tokens = [usage.input, usage.cached, usage.output] if usage else None
        self._write({"settle": ticket, "tokens": tokens, "usd": dollars})

    def _write(self, entry: dict[str, Any]) -> None:
        self._journal.append(entry)
        self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        if ticket := entry.get("reserve"):
            price = Price(*entry["price"]) if "price" in entry else None
            self._open[ticket] = Reservation(entry["stage"], entry["model"], entry["usd"], price)
            self._add_open(ticket, entry["usd"])
            self._count += self._is_own(ticket)
            if early := self._early.pop(ticket, None):
                self._apply(early)
        elif reservation := self._open.pop(entry["settle"], None):
            self._add_open(entry["settle"], -reservation.dollars)
            spent = self._spent.setdefault((reservation.stage, reservation.model), Spent())
            spent.settle(reservation.dollars, entry["tokens"], entry["usd"])
        else:
            self._early[entry["settle"]] = entry

    def _add_open(self, ticket: str, dollars: float) -> None:
        if self._is_own(ticket):
            self.reserved += dollars
        else:
            self._orphaned += dollars

    def _is_own(self, ticket: str) -> bool:
        return ticket.rpartition("-")[0] == self._run
