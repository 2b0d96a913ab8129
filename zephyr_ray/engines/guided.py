"""Writes the grammar with which vLLM makes a model follow a JSON schema.

JSON that is cut off at the token limit cannot be parsed, and a weak model may write an endless
text, or endless whitespace between two values. So the grammar has no optional whitespace. The
grammar of a second try also limits the lengths of texts, so that every answer ends before the token
limit; the first try does not use it, because xgrammar needs seconds to compile it."""

import json
from typing import Any

Schema = dict[str, Any]

TOKENS_PER_CHARACTER = 4
"""Maximum tokens per character: no character has more than four bytes."""
TEXT = r'"\"" ([^"\\\x00-\x1f] | "\\" ["\\/bfnrt])* "\""'
"""A text as JSON writes it."""
LIMITED = r'"\"" [^"\\\x00-\x1f]{0,%d} "\""'
"""A text of a maximum number of characters, without characters that JSON escapes: with those,
xgrammar would need 0.5 s per token."""


def grammar(schema: Schema, max_tokens: int | None = None) -> str:
    """Returns the grammar in xgrammar's EBNF, for answers of at most `max_tokens` tokens if given.

    The schema may use the types object (all properties are required), array (with `maxItems`),
    string, integer (with `minimum` and `maximum`) and boolean, `enum`, `const` and `anyOf`. Raises
    ValueError if it uses another type."""
    text = TEXT
    if max_tokens is not None:
        fixed, texts = _size(schema)
        # One token ends the answer.
        room = max_tokens - 1 - fixed
        text = LIMITED % max(1, room // (max(1, texts) * TOKENS_PER_CHARACTER))
    return f"root ::= {_expression(schema)}\ntext ::= {text}\n"


def _size(schema: Schema) -> tuple[int, int]:
    """Returns the maximum bytes of an answer without its texts, which bound its tokens, and the
    maximum number of texts."""
    if values := _values(schema):
        return max(len(value.encode()) for value in values), 0
    if "anyOf" in schema:
        sizes = [_size(option) for option in schema["anyOf"]]
        return max(fixed for fixed, _ in sizes), max(texts for _, texts in sizes)
    if schema["type"] == "string":
        return len('""'), 1
    if schema["type"] == "array":
        parts = [_size(schema["items"])] * schema["maxItems"]
        fixed = len("[]") + len(", ") * len(parts)
    else:
        parts = [_size(part) for part in schema["properties"].values()]
        fixed = len("{}") + sum(len(json.dumps(n)) + len(": , ") for n in schema["properties"])
    return fixed + sum(size for size, _ in parts), sum(texts for _, texts in parts)


def _values(schema: Schema) -> list[str]:
    """Returns the JSON of all values of an enum, const, integer or boolean; else an empty list."""
    values: Any = []
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
    elif schema.get("type") == "integer":
        values = range(schema["minimum"], schema["maximum"] + 1)
    elif schema.get("type") == "boolean":
        values = [True, False]
    return [json.dumps(value, ensure_ascii=False) for value in values]


def _expression(schema: Schema) -> str:
    """Returns the expression for a value. Raises ValueError if its type has none."""
    if values := _values(schema):
        return f"({' | '.join(map(_quoted, values))})"
    if "anyOf" in schema:
        return f"({' | '.join(map(_expression, schema['anyOf']))})"
    match schema["type"]:
        case "string":
            return "text"
        case "object":
            parts, before = [], "{"
            for name, part in schema["properties"].items():
                key = f"{before}{json.dumps(name, ensure_ascii=False)}: "
                parts += [_quoted(key), _expression(part)]
                before = ", "
            return f"({' '.join(parts)} {_quoted('}')})"
        case "array":
            item = _expression(schema["items"])
            least, most = max(1, schema.get("minItems", 0)), schema["maxItems"]
            filled = f'"[" {item} (", " {item}){{{least - 1},{most - 1}}} "]"'
            return f"({filled})" if schema.get("minItems") else f'({filled} | "[]")'
    raise ValueError(f"no grammar for the type {schema['type']}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
