"""Defines the two kinds of failure. The type tells the caller whether to retry.

Messages can quote clients' exceptions and settings, and reach terminals, logs, journals and
MLflow; so secrets in them are masked on construction.
"""

import difflib
from collections.abc import Iterable

from zephyr_ray.masking import masked


class Permanent(Exception):
    """A failure that no retry can help: bad input, bad key, budget spent. Shown as one line; exit
    code 2."""

    def __init__(self, message: object = ""):
        super().__init__(masked(message))


class RowError(Permanent):
    """A failure caused by one row: too long, refused for its content, or unreadable. The row is
    dropped and counted; the stage continues."""

    def __init__(self, message: object = "", cause: str = "unusable"):
        super().__init__(message)
        self.cause = cause
        """The cause in a word or two; failed rows are counted by cause."""


class Temporary(Exception):
    """A failure that a retry can help: rate limit, server error, timeout, lost worker."""

    def __init__(self, message: object = ""):
        super().__init__(masked(message))


def suggest(name: str, known: Iterable[object]) -> str:
    """Returns the end of an error line that suggests the closest of the known names, or all."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"
