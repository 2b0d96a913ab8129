"""Finds the types of a data set's columns for its card.

If the card does not state them, `datasets` takes the types from the first 10 MB of a file and fails
if a later row differs, for example a score of 7.5 after integers.
"""

from collections.abc import Iterable
from typing import Any

Type = Any
"""None if all values are null; else a type's name, [the type of the items], or {field: type}."""
MIXED = "json"
"""The type of a column with values of different types, which `datasets` keeps as JSON."""


def column_types(rows: Iterable[dict[str, Any]]) -> dict[str, Type]:
    """Returns the type of every column."""
    types: dict[str, Type] = {}
    for row in rows:
        for name, value in row.items():
            types[name] = _merge(types.get(name), _type(value))
    return types


def to_features(types: dict[str, Type]) -> list[dict[str, Any]]:
    """Returns the types in the form in which `datasets` writes its features into a card."""
    return [{"name": name, **_feature(value)} for name, value in types.items()]


def _type(value: Any) -> Type:
    if isinstance(value, dict):
        # Arrow has no struct without fields.
        return {name: _type(v) for name, v in value.items()} or MIXED
    if isinstance(value, list):
        items: Type = None
        for item in value:
            items = _merge(items, _type(item))
        return [items]
    names = {bool: "bool", int: "int64", float: "float64", str: "string"}
    if isinstance(value, int) and abs(value) >= 2**63:
        return "float64"
    return None if value is None else names[type(value)]


def _merge(one: Type, other: Type) -> Type:
    """Returns a type that can hold the values of both."""
    if one == other or other is None:
        return one
    if one is None:
        return other
    if isinstance(one, list) and isinstance(other, list):
        return [_merge(one[0], other[0])]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {name: _merge(one[name], other[name]) for name in one}
    numbers = ("int64", "float64")
    return "float64" if one in numbers and other in numbers else MIXED


def _feature(kind: Type) -> dict[str, Any]:
    if isinstance(kind, dict):
        return {"struct": to_features(kind)}
    if isinstance(kind, list):
        item = _feature(kind[0])
        return {"list": item["dtype"] if "dtype" in item else item.get("struct", item)}
    return {"dtype": kind or "null"}
