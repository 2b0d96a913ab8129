"""Defines the price and the rate limits of calls to a model, and the usage of a call."""

from dataclasses import dataclass
from typing import Any

MILLION = 1e6
MOST_TOKENS = 10**12
"""Maximum plausible tokens per request; a server that states more is wrong."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, as a server counts them."""

    input: int = 0
    output: int = 0
    cached: int = 0
    """Part of `input` that the server had cached."""

    @property
    def tokens(self) -> int:
        return self.input + self.output


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input: float
    output: float
    cached: float

    @classmethod
    def of(cls, values: tuple[float, ...]) -> "Price":
        """Returns the price stated in a recipe; without a third value, cached input costs as much
        as other input."""
        return cls(values[0], values[1], values[2] if len(values) > 2 else values[0])

    def dollars(self, usage: Usage) -> float:
        uncached = usage.input - usage.cached
        cost = uncached * self.input + usage.cached * self.cached + usage.output * self.output
        return cost / MILLION

    def most(self, usage: Usage) -> float:
        """Returns the maximum dollars, for input that is all cached or not cached at all."""
        return (usage.input * max(self.input, self.cached) + usage.output * self.output) / MILLION


@dataclass(frozen=True)
class Tariff:
    """The limits and the price of the calls of a model."""

    account: str
    """Name of the account whose models share the limits."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    price: Price | None = None
    lasts: float = 660
    """Maximum seconds that a request is in flight."""


def read_usage(reply: Any) -> Usage | None:
    """Returns the usage that the JSON of a chat completion states; None if it states none."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    prompt, output = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if prompt is None or output is None:
        return None
    # Some servers state the tokens of reasoning only in the total.
    output = max(output, (_count(usage, "total_tokens") or 0) - prompt)
    return Usage(prompt, output, min(cached or 0, prompt))


def _count(counts: dict[str, Any], name: str) -> int | None:
    value = counts.get(name)
    return value if isinstance(value, int) and 0 <= value < MOST_TOKENS else None
