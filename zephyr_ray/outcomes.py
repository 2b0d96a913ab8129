"""Defines the outcomes of rows, and the notices of actors, as typed journal entries.

The type determines the policy: an answer is kept, a row fault drops the row, and an environment
fault (server, network, engine, our own code) leaves the row to the next attempt.
"""

from dataclasses import dataclass
from typing import Any

from zephyr_ray.masking import masked


@dataclass(frozen=True)
class Answered:
    """A row's result."""

    id: str
    row: dict[str, Any]


@dataclass(frozen=True)
class RowFault:
    """A failure of the row itself; it is counted by its cause and dropped."""

    id: str
    row_fault: str
    cause: str


@dataclass(frozen=True)
class EnvironmentFault:
    """A failure for a reason outside the row; the next attempt retries it."""

    id: str
    environment_fault: str


@dataclass(frozen=True)
class EngineDied:
    """A crash of the engine while these rows were in flight."""

    died: list[str]


@dataclass(frozen=True)
class Stopped:
    """A failure that affects every row; the stage stops."""

    stop: str


@dataclass(frozen=True)
class Notice:
    """An actor's message for the console, which belongs to another process."""

    notice: str


Outcome = Answered | RowFault | EnvironmentFault | EngineDied | Stopped | Notice
_BY_FIELDS = {frozenset(o.__dataclass_fields__): o for o in Outcome.__args__}


def to_entry(outcome: Outcome) -> dict[str, Any]:
    """Returns the journal entry of an outcome; reasons, which may quote exceptions, are masked."""
    fields = vars(outcome).items()  # `asdict` would copy the row
    return {k: v if k == "id" or not isinstance(v, str) else masked(v) for k, v in fields}


def from_entry(entry: dict[str, Any]) -> Outcome | None:
    """Returns the outcome in a journal entry; None if its format is unknown, so that its row
    runs again."""
    outcome = _BY_FIELDS.get(frozenset(entry))
    return outcome(**entry) if outcome else None
