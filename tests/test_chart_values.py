"""Tests null and missing values: each results in its default, in nothing, or in a chart error.

Helm drops a null that replaces a default and keeps one that replaces nothing, as after
`helm upgrade --reuse-values`. With an empty values.yaml, both kinds reach the templates."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_tools import CHART, GOLDEN, default_values, merged, template

Key = tuple[str, ...]
ENABLED = merged(
    default_values(),
    {
        "pipeline": {"enabled": True},
        "serve": {"enabled": True, "run": "quickstart", "apiKeys": {"existingSecret": "keys"}},
        "mlflow": {"auth": {"existingSecret": "zephyr-accounts"}},
    },
)
EVERYTHING = merged(
    default_values(), yaml.safe_load((GOLDEN / "everything-values.yaml").read_text())
)
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
WHOLE = ("workerGroups", "user")
"""Maps whose own keys have no default: a null there removes a group, a key of one, or a user ID."""


@pytest.fixture(scope="module", name="bare")
def _bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the chart for which helm adds no defaults."""
    chart = tmp_path_factory.mktemp("bare") / "zephyr"
    shutil.copytree(CHART, chart)
    (chart / "values.yaml").write_text("{}\n")
    return chart


def test_every_template_starts_with_the_defaults_and_the_rules() -> None:
    templates = [p for p in (CHART / "templates").rglob("*") if p.suffix in (".yaml", ".txt")]
    assert len(templates) > 20
    for path in templates:
        assert path.read_text().startswith('{{- include "zephyr.prepare" . -}}\n'), path.name


@pytest.mark.parametrize("null", [True, False], ids=["null", "missing"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_key_without_a_value_has_its_default(bare: Path, depth: int, null: bool) -> None:
    """One render clears all keys of a depth at once: the templates see only completed values."""
    keys = [
        key
        for key in paths(default_values())
        if len(key) == depth
        and key[0] not in WHOLE
        and at(ENABLED, key) == at(default_values(), key)
    ]
    assert len(keys) > 5
    values = deepcopy(ENABLED)
    for key in keys:
        clear(values, key, null)
    assert rendered(bare, values) == rendered(bare, ENABLED)


@pytest.mark.parametrize("key", ["workerGroups", "user"])
def test_a_map_without_a_value_has_its_default(bare: Path, key: str) -> None:
    for null in (True, False):
        values = deepcopy(ENABLED)
        clear(values, (key,), null)
        assert rendered(bare, values) == rendered(bare, ENABLED)


def test_every_key_of_a_full_configuration_may_be_null(bare: Path) -> None:
    """Renders, or fails with one error line of the chart; runs helm once per key."""

    def outcome(key: Key) -> str:
        values = deepcopy(EVERYTHING)
        clear(values, key, null=True)
        done = template(chart=bare, given=values)
        errors = re.findall("^Error:.*(?:\n.+)*", done.stderr, re.MULTILINE)
        bad = any(sign in done.stdout for sign in ("<nil>", "null", "%!"))
        own = re.fullmatch(r"Error: execution error at \(\S+\): .+", "".join(errors))
        fine = own if done.returncode else not bad
        return "" if fine else f"{'.'.join(key)}: {done.stderr or done.stdout}"

    keys = [key for key in paths(EVERYTHING) if key not in set(paths(default_values()))]
    keys += [
        key
        for key in paths(EVERYTHING)
        if key[0] in WHOLE or at(EVERYTHING, key) != at(ENABLED, key)
    ]
    assert len(keys) > 80
    with ThreadPoolExecutor(2) as pool:
        assert [line for line in pool.map(outcome, sorted(set(keys))) if line] == []


def test_a_null_user_leaves_the_ids_to_the_cluster(bare: Path) -> None:
    output = rendered(bare, merged(ENABLED, {"user": {"id": None, "group": None}}))
    assert "runAsNonRoot: true" in output
    assert not any(f"{field}:" in output for field in ("runAsUser", "runAsGroup", "fsGroup"))


def test_a_null_does_not_switch_authentication_off(bare: Path) -> None:
    done = template(chart=bare, given=merged(ENABLED, {"networkPolicy": {"enabled": False}}))
    assert done.returncode == 0
    values = deepcopy(ENABLED) | {"networkPolicy": {"enabled": False}}
    values["ray"]["auth"] = None
    output = rendered(bare, values)
    assert output.count("mode: token") == output.count("authOptions:") == 3


def test_the_schema_accepts_null_for_every_key() -> None:
    def refusing(schema: Any, at: str) -> Iterator[str]:
        if "$ref" in schema:
            schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
        if "required" in schema:
            yield f"{at}: required"
        for part in schema.get("anyOf", [schema]):
            part = SCHEMA["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
            if "null" in part["type"] and None in part.get("enum", [None]):
                break
        else:
            yield at
        for name, value in schema.get("properties", {}).items():
            yield from refusing(value, f"{at}.{name}")
        if isinstance(schema.get("additionalProperties"), dict):
            yield from refusing(schema["additionalProperties"], f"{at}.*")

    refused = [key for name, s in SCHEMA["properties"].items() for key in refusing(s, name)]
    assert refused == []


def paths(values: dict[str, Any], *above: str) -> Iterator[Key]:
    """Yields the path of every key in nested maps."""
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, *above, name)


def at(values: Any, key: Key) -> Any:
    for name in key:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def clear(values: dict[str, Any], key: Key, null: bool) -> None:
    for name in key[:-1]:
        values = values[name]
    values.pop(key[-1], None)
    if null:
        values[key[-1]] = None


def rendered(chart: Path, values: dict[str, Any]) -> str:
    done = template(chart=chart, given=values)
    assert done.returncode == 0, done.stderr
    return done.stdout
