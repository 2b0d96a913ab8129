"""Makes the answers of a simulated model; at temperature 0 they depend only on the request."""

import json
import math
import random
import re
from typing import Any

WORDS = re.findall(
    r"\w+",
    "a river carries warm water past the old stone mill while children count small boats and "
    "their parents cook lentils with garlic on an iron stove near the open window every autumn "
    "evening until lamps glow along both banks of that quiet northern town",
)
WORD_RANGE = (6, 60)
"""Minimum and maximum number of words per answer."""


def count_tokens(text: str) -> int:
    """Returns the number of tokens in a text: one per four characters, rounded up."""
    return -(-len(text) // 4)


def prompt_tokens(body: dict[str, Any]) -> int:
    """Returns the number of tokens in the request's messages, with three more per message."""
    return sum(3 + count_tokens(message["content"]) for message in body["messages"])


def cached_tokens(body: dict[str, Any]) -> int:
    """Returns the number of prompt tokens billed as cached: half if their number is odd, else 0."""
    tokens = prompt_tokens(body)
    return tokens // 2 if tokens % 2 else 0


def choice(body: dict[str, Any], draw: str) -> dict[str, Any]:
    """Returns one choice of a chat completion. `draw` varies it, except at temperature 0."""
    content = (body["model"], body["messages"], body.get("response_format"))
    rng = random.Random(f"{content} {draw if body.get('temperature', 1) else ''}")
    if body.get("logprobs"):
        return preference(body)
    text = _text(body, rng)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 10**6
    end = "stop" if count_tokens(text) <= limit else "length"
    message = {"role": "assistant", "content": text[: 4 * limit]}
    return {"index": 0, "finish_reason": end, "message": message}


def preference(body: dict[str, Any]) -> dict[str, Any]:
    """Returns token A or B with the log-probabilities of both, which depend only on the
    messages."""
    share = random.Random(str(body["messages"])).uniform(0.05, 0.95)
    tokens = [
        {"token": "A", "logprob": math.log(share)},
        {"token": "B", "logprob": math.log(1 - share)},
    ]
    tokens.sort(key=lambda token: -token["logprob"])
    first = {**tokens[0], "top_logprobs": tokens[: body["top_logprobs"]]}
    message = {"role": "assistant", "content": first["token"]}
    return {
        "index": 0,
        "finish_reason": "length",
        "message": message,
        "logprobs": {"content": [first]},
    }


def _text(body: dict[str, Any], rng: random.Random) -> str:
    """Returns a verdict if the request asks for one, else a few sentences."""
    if schema := (body.get("response_format") or {}).get("json_schema", {}).get("schema"):
        return json.dumps(instance(schema, rng))
    question = body["messages"][-1]["content"]
    if "'rank'" in question:
        first = rng.choice((1, 2))
        return str([{"model": "model_1", "rank": first}, {"model": "model_2", "rank": 3 - first}])
    if match := re.search(r'"score": a (?:whole )?number from (\d+)[^0-9]* to (\d+)', question):
        verdict = {"rationale": _sentence(rng), "score": rng.randint(*map(int, match.groups()))}
        return json.dumps(verdict)
    return _sentence(rng)


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(*WORD_RANGE))).capitalize() + "."


def instance(schema: dict[str, Any], rng: random.Random) -> Any:
    """Returns a random value that a JSON schema allows; knows the keywords that judge forms use."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if options := schema.get("anyOf"):
        return instance(rng.choice(options), rng)
    kind = schema.get("type")
    if isinstance(kind, list):
        return instance(schema | {"type": rng.choice(kind)}, rng)
    if kind == "object":
        return {name: instance(inner, rng) for name, inner in schema["properties"].items()}
    if kind == "array":
        return [instance(schema["items"], rng) for _ in range(schema.get("minItems", 1))]
    if kind in ("integer", "number"):
        return rng.randint(schema.get("minimum", 1), schema.get("maximum", 10))
    return {"string": _sentence(rng), "boolean": rng.random() < 0.5, "null": None}[str(kind)]
