"""The two kinds of failure. Policy lives in the type: who catches one knows what to do."""


class Permanent(Exception):
    """Trying again cannot help: bad input, bad key, budget spent. One clear line; exit code 2."""


class Temporary(Exception):
    """Trying again can help: rate limits, server errors, time-outs, a lost worker."""
