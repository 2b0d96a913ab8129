"""Defines the two kinds of failure. The type tells the caller whether to retry."""


class Permanent(Exception):
    """A failure that no retry can help: bad input, bad key, budget spent. Shown as one line; exit
    code 2."""


class Temporary(Exception):
    """A failure that a retry can help: rate limit, server error, timeout, lost worker."""
