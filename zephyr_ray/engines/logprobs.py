"""Reads the log-probabilities in a chat completion of an endpoint."""

import re
from typing import Any

from zephyr_ray.messages import encodable
from zephyr_ray.models.contract import TopLogprobs

LOGPROBS = re.compile(r"log[ _-]?prob", re.IGNORECASE)
"""Matches the parameters `logprobs` and `top_logprobs`, and what error messages call them."""
LOWEST, HIGHEST = -1e6, 1e-3
"""Range of a log-probability; OpenAI states -9999 for a token that is very unlikely, and rounding
may give a little more than 0."""
MOST_TOKENS = 100
"""Maximum alternatives of the first token to read; OpenAI returns at most 20."""


def read_first_tokens(choice: dict[str, Any]) -> TopLogprobs:
    """Returns the first token of a choice and its alternatives; nothing if an endpoint lists no
    alternatives, because the sampled token alone says nothing about the others."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    listed = first.get("top_logprobs") if isinstance(first, dict) else None
    if not isinstance(listed, list) or not listed:
        return ()
    tokens = [token for entry in listed[:MOST_TOKENS] if (token := _token(entry))]
    sampled = _token(first)
    if sampled and sampled[0] not in {text for text, _ in tokens}:
        tokens.append(sampled)
    return tuple(tokens)


def _token(entry: Any) -> tuple[str, float] | None:
    if not isinstance(entry, dict):
        return None
    text, value = entry.get("token"), entry.get("logprob")
    if not isinstance(text, str) or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return (encodable(text), float(value)) if LOWEST <= value <= HIGHEST else None
