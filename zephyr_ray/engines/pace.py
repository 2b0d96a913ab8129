"""Spreads requests evenly over time, so that the limits of an account are used but never exceeded.

Times are those of the caller's clock, in seconds.
"""

from collections import deque

from zephyr_ray.engines.tariff import Tariff, Usage

SHARE, TOKEN_SHARE = 0.985, 0.99
"""Shares of the request and token limits to use. The rest covers catching up, delays of requests on
their way to the server, and errors in the expected tokens."""
CATCH_UP = 0.25
"""Maximum seconds of delay that later requests make up for; 0 for limits below one unit per second,
because a server may check each interval."""
WINDOW = 60.3
"""Seconds over which tokens are summed: a minute, plus the delay of requests on their way."""
LOWER, RAISE_SECONDS = 0.8, 300.0
"""Factor on the pace per rate limit, and seconds in which the pace grows from 0 to the recipe's."""
REACTION_SECONDS = 5.0
"""Minimum seconds between reductions, because requests in flight were sent at the earlier pace."""
LEAST = 0.05
"""Minimum share of the recipe's pace."""
LONGEST_PAUSE = 600
"""Maximum seconds that a rate limit pauses all requests. Rows that get a longer one are left to the
next run; enough of them stop the stage."""
LEARNED, REMEMBERED = 10, 500
"""Requests after which the expected tokens of a request depend only on what earlier ones used, and
number of recent requests in that average."""


class Pace:
    """A rate of units per minute: the generic cell rate algorithm."""

    def __init__(self, per_minute: float, share: float):
        self._seconds = 60 / (share * per_minute)
        """Seconds per unit."""
        self._catch_up = CATCH_UP if per_minute >= 60 else 0.0
        self._next = 0.0
        """Time from which more units may be taken."""

    def delay(self, now: float) -> float:
        """Returns the seconds until more units may be taken."""
        return max(0.0, self._next - now)

    def take(self, now: float, units: float, factor: float) -> None:
        """Takes units at this factor of the rate."""
        start = max(self._next, now - self._catch_up)
        self._next = start + units * self._seconds / factor


class Taken:
    """Tokens of one request: those expected, and once it is settled, those used."""

    def __init__(self, at: float, most: Usage, tokens: float):
        self.at, self.most, self.tokens = at, most, tokens


class Tokens:
    """The tokens of all requests of the last minute, which must not exceed a limit."""

    def __init__(self, per_minute: float):
        self._limit, self._pace = TOKEN_SHARE * per_minute, Pace(per_minute, 1.0)
        self._taken: deque[Taken] = deque()
        self._sum = 0.0
        self._most = self._used = 0.0
        """Tokens of earlier requests: their maximum, and those used."""
        self._seen = 0

    def delay(self, now: float, most: Usage) -> float:
        """Returns the seconds until a request may be sent."""
        while self._taken and self._taken[0].at + WINDOW <= now:
            self._sum -= self._taken.popleft().tokens
        if self._taken and self._sum + self._expected(most) > self._limit:
            return self._taken[0].at + WINDOW - now
        return self._pace.delay(now)

    def take(self, now: float, most: Usage, factor: float) -> Taken:
        taken = Taken(now, most, self._expected(most))
        self._pace.take(now, taken.tokens, factor)
        self._taken.append(taken)
        self._sum += taken.tokens
        return taken

    def settle(self, taken: Taken, used: int) -> None:
        """Counts what a request used instead of what it was expected to use."""
        if self._taken and taken.at >= self._taken[0].at:
            self._sum += used - taken.tokens
        taken.tokens = used
        if used:  # otherwise the server did not answer
            kept = 1 - 1 / REMEMBERED
            self._most = kept * self._most + taken.most.tokens
            self._used = kept * self._used + used
            self._seen += 1

    def _expected(self, most: Usage) -> float:
        """Returns the expected tokens of a request: at first its maximum, later the share of the
        maximum that earlier requests used."""
        share = self._used / self._most if self._most else 1.0
        learned = min(1.0, self._seen / LEARNED)
        return most.tokens * (1 - learned + learned * share)


class Account:
    """The pace of all requests to one account, whose models have these tariffs."""

    def __init__(self, tariffs: list[Tariff]):
        requests = [t.requests_per_minute for t in tariffs if t.requests_per_minute]
        tokens = [t.tokens_per_minute for t in tariffs if t.tokens_per_minute]
        self._requests = Pace(min(requests), SHARE) if requests else None
        self._tokens = Tokens(min(tokens)) if tokens else None
        self._paused_until = 0.0
        self._factor, self._changed = 1.0, -REACTION_SECONDS
        """Factor of the pace after the last rate limit, and the time of that limit."""

    def delay(self, now: float, most: Usage) -> float:
        """Returns the seconds until a request that uses at most these tokens may be sent."""
        requests = self._requests.delay(now) if self._requests else 0.0
        tokens = self._tokens.delay(now, most) if self._tokens else 0.0
        return max(self._paused_until - now, requests, tokens)

    def take(self, now: float, most: Usage) -> Taken | None:
        """Counts a request that is sent now; returns its tokens, if they are limited."""
        factor = self._grown(now)
        if self._requests:
            self._requests.take(now, 1, factor)
        return self._tokens.take(now, most, factor) if self._tokens else None

    def settle(self, taken: Taken | None, usage: Usage | None) -> None:
        """Replaces the expected tokens of a request by those that it used, if they are known."""
        if self._tokens and taken and usage:
            self._tokens.settle(taken, usage.tokens)

    def limited(self, now: float, after: float | None) -> None:
        """Reacts to a rate limit of the server, which may state the seconds to wait."""
        if after and after <= LONGEST_PAUSE:
            self._paused_until = max(self._paused_until, now + after)
        if now >= self._changed + REACTION_SECONDS:
            self._factor, self._changed = max(LEAST, LOWER * self._grown(now)), now

    def _grown(self, now: float) -> float:
        return min(1.0, self._factor + (now - self._changed) / RAISE_SECONDS)
