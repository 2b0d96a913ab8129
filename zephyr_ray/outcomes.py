"""How rows end, as typed entries of a journal.

The type carries the policy: an answer is kept, a fault of the row drops it, and a fault of the
world (server, network, engine, our own code) leaves it to the next attempt.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Answered:
    id: str
    row: dict[str, Any]


@dataclass(frozen=True)
class RowFault:
    """The row cannot be answered: it is counted and dropped."""

    id: str
    row_fault: str


@dataclass(frozen=True)
class WorldFault:
    """The row was not answered for a reason that is not its own: it is asked again."""

    id: str
    world_fault: str


@dataclass(frozen=True)
class EngineDied:
    """The engine died while these rows were in flight."""

    died: list[str]


@dataclass(frozen=True)
class Stopped:
    """A failure that concerns every row."""

    stop: str


Outcome = Answered | RowFault | WorldFault | EngineDied | Stopped
_BY_FIELDS = {frozenset(o.__dataclass_fields__): o for o in Outcome.__args__}


def entry(outcome: Outcome) -> dict[str, Any]:
    """Returns the outcome as one entry of a journal."""
    return asdict(outcome)


def read(entry: dict[str, Any]) -> Outcome | None:
    """Returns the outcome in an entry; None if it is of another format, so that its row is asked
    again."""
    outcome = _BY_FIELDS.get(frozenset(entry))
    return outcome(**entry) if outcome else None
