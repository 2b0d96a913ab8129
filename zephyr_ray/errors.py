"""The two kinds of failure. The type carries the policy: it tells the caller whether to retry."""


class Permanent(Exception):
    """A retry cannot help: bad input, bad key, budget spent. Shown as one line; exit code 2."""


class Temporary(Exception):
    """A retry can help: rate limit, server error, timeout, lost worker."""
