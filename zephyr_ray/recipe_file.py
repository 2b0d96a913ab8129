"""The recipe file as it is written: YAML with every key once, `extends`, and `--set` overrides.

A recipe may build on another one (`extends: quickstart.yaml`) and add or replace lines.
"""

from pathlib import Path
from typing import Any

import yaml

from zephyr_ray.errors import Permanent


def read(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[Path]]:
    """The settings of a recipe file, not yet checked, and the folders its files may lie in: its
    own, then that of the recipe it extends. Permanent where it cannot be read."""
    raw, folders = read_yaml(path), [path.parent]
    if "extends" in raw:
        base = path.parent / str(raw.pop("extends"))
        below = read_yaml(base)
        if "extends" in below:
            raise Permanent(
                f"{path}: extends {base}, which itself extends another; extend that one"
            )
        raw = _extend(below, raw)
        folders.append(base.parent)
    for text in overrides:
        _override(raw, text)
    return raw, folders


def mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        raise Permanent(f"{where}: expected 'name: value' lines, found {found}")
    return value


def _extend(base: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe on top of one beside it. A stage it repeats keeps its place; new ones stand before
    the repeated one that follows them, or at the end."""
    old, new = (mapping(r.get("stages") or {}, "stages") for r in (base, raw))
    order, waiting = list(old), []
    for name in new:
        waiting.append(name)
        if name in old:
            at = order.index(name)
            order[at : at + 1] = waiting
            waiting = []
    stages = {name: new.get(name, old.get(name)) for name in [*order, *waiting]}
    below, above = (mapping(r.get("models") or {}, "models") for r in (base, raw))
    models = {**below, **above}
    return {**base, **raw, "models": models, "stages": stages}


def _override(raw: dict[str, Any], text: str) -> None:
    """Applies one `stage.setting=value`, `models.name.setting=value` or `seed=value`."""
    target, equals, value = text.partition("=")
    path = target.strip().split(".")
    if not equals or not all(path):
        raise Permanent(f"--set {text}: write stage.setting=value")
    place: Any = raw
    if path[0] in (raw.get("stages") or {}):
        path = ["stages", *path]
    for part in path[:-1]:
        if not isinstance(place, dict) or not isinstance(place.get(part), dict):
            hint = f"; a model's are models.{text}" if part in (raw.get("models") or {}) else ""
            raise Permanent(f"--set {text}: the recipe has no '{part}'{hint}")
        place = place[part]
    try:
        place[path[-1]] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise Permanent(f"--set {text}: cannot read the value '{value}'") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys; a stage lost that way would be silent."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """A file of `name: value` lines; a key that stands twice, and all else wrong, is Permanent."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise Permanent(f"cannot read the {what} {path}: {reason}") from None
    try:
        return mapping(yaml.load(text, _UniqueKeys), str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Permanent(f"{path}{line}: {problem}") from None
    except ValueError as error:  # a date that is none, for one
        raise Permanent(f"{path}: {error}") from None
