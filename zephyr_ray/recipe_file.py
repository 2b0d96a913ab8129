"""Reads a recipe file: YAML without duplicate keys, `extends`, and `--set` overrides.

A recipe may extend another one (`extends: quickstart.yaml`) and add or replace its settings,
models and stages.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.masking import has_credentials, is_secret

SECRET_SETTING = re.compile(
    r"(^|\.)((api|access)[-_]?key|passw(or)?d|secret|(auth|access|bearer)[-_]?token|authorization)$",
    re.IGNORECASE,
)
"""Matches the path of a setting in which a user might write a secret."""
NOT_SECRET = ("prompt_cache_key",)
"""Parameters of OpenAI's API whose names only look secret."""


def read(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[Path]]:
    """Returns a recipe's unchecked settings, and the folders to search for the files it names: its
    own, then that of the recipe it extends. Raises Permanent if it cannot be read."""
    raw, folders = read_yaml(path), [path.parent]
    if "extends" in raw:
        base = path.parent / os.path.expanduser(str(raw.pop("extends")))
        below = read_yaml(base)
        if base.resolve() == path.resolve():
            raise Permanent(f"{path}: extends itself; name another recipe")
        if "extends" in below:
            raise Permanent(
                f"{path}: extends {base}, which extends another recipe; extend that one instead"
            )
        raw = _extend(below, raw)
        folders.append(base.parent)
    for text in overrides:
        _override(raw, text)
    _refuse_swept(raw, overrides)
    refuse_secrets(raw, str(path), "set api_key_env to the name of the variable that holds the key")
    return raw, folders


def refuse_secrets(value: Any, where: str, instead: str, setting: str = "") -> None:
    """Raises Permanent if a recipe or profile, which is stored, holds a secret: a URL with
    credentials, a query in a base_url, or a string in a setting such as `password`. The error
    never quotes the secret; `instead` is the fix."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            refuse_secrets(part, where, instead, f"{setting}.{name}".removeprefix("."))
    elif isinstance(value, str) and has_credentials(value):
        raise Permanent(
            f"{where}: setting '{setting}': its URL contains credentials, which would be stored; "
            f"write it without user or password, and {instead}"
        )
    elif isinstance(value, str) and setting.endswith("base_url") and "?" in value:
        raise Permanent(
            f"{where}: setting '{setting}': its URL contains a query, which may hold a key and "
            f"would be stored; write it without '?', and {instead}"
        )
    elif isinstance(value, str) and _is_secret_setting(setting):
        raise Permanent(
            f"{where}: setting '{setting}' is a secret, which would be stored; remove it, and "
            f"{instead}"
        )


def _is_secret_setting(setting: str) -> bool:
    """Returns whether a string at this path is a secret. A model's `parameters` may have any names,
    because they belong to the endpoint's API; every header in them counts as a secret."""
    _, _, free = setting.partition(".parameters.")
    names = [name for name in free.split(".") if name and not name.isdigit()]
    return bool(
        SECRET_SETTING.search(setting)
        or any("headers" in name.lower() for name in names)
        or (names and is_secret(names[-1]) and names[-1] not in NOT_SECRET)
    )


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Returns `value` if it is a mapping. Raises Permanent otherwise, and names `where`."""
    if not isinstance(value, dict):
        actual = "nothing" if value is None else type(value).__name__
        raise Permanent(f"{where}: not a mapping but {actual}; write 'name: value' lines")
    return value


def _extend(base: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Merges a recipe into the one it extends. A repeated stage keeps its position; new stages go
    before the repeated stage that follows them, or to the end."""
    old, new = (mapping(r.get("stages") or {}, "stages") for r in (base, raw))
    order, pending = list(old), []
    for name in new:
        pending.append(name)
        if name in old:
            index = order.index(name)
            order[index : index + 1] = pending
            pending = []
    stages = {name: new.get(name, old.get(name)) for name in [*order, *pending]}
    below, above = (mapping(r.get("models") or {}, "models") for r in (base, raw))
    models = {**below, **above}
    return {**base, **raw, "models": models, "stages": stages}


def _override(raw: dict[str, Any], text: str) -> None:
    """Applies one `stage.setting=value`, `models.name.setting=value`, `sweep.stage.setting=[…]` or
    `seed=value`. An error never quotes the value, which may be a secret."""
    target, equals, value = text.partition("=")
    target = target.strip()
    path = target.split(".")
    if not equals or not all(path):
        where = f"--set {target}=…" if equals else "--set"
        raise Permanent(f"{where}: not an assignment; write stage.setting=value")
    parent: Any = raw
    if path[0] in _names(raw, "stages"):
        path = ["stages", *path]
    if path[0] == "sweep" and len(path) > 1:
        path = ["sweep", ".".join(path[1:])]
        raw.setdefault("sweep", {})
    for depth, part in enumerate(path[:-1]):
        if parent.get(part) is None:
            hint = _hint(raw, path, depth)
            raise Permanent(f"--set {target}=…: the recipe has no '{part}'{hint}")
        parent = parent[part]
        if not isinstance(parent, dict):
            name = ".".join(path[: depth + 1]).removeprefix("stages.")
            raise Permanent(f"--set {target}=…: '{part}' is not a mapping; write {name}=value")
    try:
        parent[path[-1]] = _value(value.strip())
    except _NoSpace as error:
        raise Permanent(f"--set {target}=…: {error.problem}") from None
    except (yaml.YAMLError, ValueError):
        raise Permanent(f"--set {target}=…: the value is not valid YAML; quote it") from None


def _refuse_swept(raw: dict[str, Any], overrides: list[str]) -> None:
    """Raises Permanent if an override sets a setting whose values the sweep sets."""
    swept = _names(raw, "sweep")
    for text in overrides:
        target = text.partition("=")[0].strip()
        setting = ".".join(target.removeprefix("stages.").split(".")[:2])
        if setting in swept:
            raise Permanent(
                f"--set {target}=…: the recipe sweeps {setting}; write sweep.{setting}=[…], or "
                "sweep={} for no sweep"
            )


def _value(text: str) -> Any:
    """Returns the value of an override. Text in brackets or quotes is YAML; any other text is taken
    as typed, because YAML would drop a comment or split `a: b`."""
    loader = _AsTyped(text if text.startswith(("[", "{", '"', "'")) else "")
    node = loader.get_single_node()
    if node is None:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    if node.end_mark.index < len(text):
        raise ValueError("a comment follows the value")
    return loader.construct_document(node)


def _names(raw: dict[str, Any], section: str) -> dict[Any, Any]:
    """Returns the entries of an unchecked section; none if it is missing or not a mapping."""
    entries = raw.get(section)
    return entries if isinstance(entries, dict) else {}


def _hint(raw: dict[str, Any], path: list[str], depth: int) -> str:
    """Returns the fix for an override of a `path` that the recipe lacks at `depth`."""
    models = _names(raw, "models")
    if depth == 0 and path[0] in models:
        return f"; write models.{'.'.join(path)}=…"
    if depth == 0 and path[0] not in ("models", "hardware"):
        return suggest(path[0], {*_names(raw, "stages"), "models", "hardware"})
    if path[:depth] == ["models"]:
        return suggest(path[1], models)
    name, inner = ".".join(path[: depth + 1]).removeprefix("stages."), path[depth + 1 :]
    value = "{" + ": {".join(inner) + ": …" + "}" * len(inner)
    return f" as a mapping; write --set '{name}={value}'"


class _NoSpace(yaml.constructor.ConstructorError):
    """The error for `{a:1}`, which YAML reads as a key "a:1" without a value."""


class _UniqueKeys(yaml.SafeLoader):
    """A loader that rejects duplicate keys, of which YAML would silently keep the last, and keys
    that result from a missing space."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, value_node in node.value:
            is_glued = node.flow_style and ":" in str(key_node.value)
            if is_glued and value_node.value == "" and not value_node.style:
                problem = "a mapping needs a space after the colon; write {name: value}"
                raise _NoSpace(None, None, problem, key_node.start_mark)
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _AsTyped(_UniqueKeys):
    """A loader that converts only JSON's numbers, true, false and null. Other unquoted text stays a
    string, which its setting converts; YAML 1.1 would read no as false, 007 as 7, 1:30 as 90."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


for _type, _pattern in {
    "null": "|~|null",
    "bool": "true|false",
    "int": "-?(0|[1-9][0-9]*)",
    "float": r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?",
}.items():
    _AsTyped.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(f"(?:{_pattern})$"), None
    )


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises Permanent if it is invalid or repeats a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise Permanent(f"cannot read the {what} {path}: {reason}; correct the path") from None
    try:
        return mapping(yaml.load(text, _UniqueKeys), str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Permanent(f"{path}{line}: {problem}") from None
    except ValueError as error:  # an impossible date, for example
        raise Permanent(f"{path}: a value is invalid: {error}; correct or quote it") from None
