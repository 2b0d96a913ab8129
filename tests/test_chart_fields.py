"""Tests the pod fields that users can set in the chart against the pod schema in KubeRay's CRDs:
each is accepted, rejected if misspelled, and rendered as the operator writes it back."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import pytest
from chart_tools import CHART, Document, crd_errors, documents, kind, merged, template
from crds import crd_schema
from typed_form import changes

Path = tuple[str | int, ...]
PARTS = ("ray.head", "workerGroups.cpu", "pipeline.submitter", "mlflow")
RAY = PARTS[:2]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
CONTAINER = ("containers", 0)
FIELDS: dict[str, Path] = {
    "affinity": ("affinity",),
    "tolerations": ("tolerations",),
    "topologySpreadConstraints": ("topologySpreadConstraints",),
    "extraEnv": (*CONTAINER, "env"),
    "extraVolumes": ("volumes",),
    "extraVolumeMounts": (*CONTAINER, "volumeMounts"),
    "initContainers": ("initContainers",),
    "sidecars": ("containers",),
}
"""Path of the pod field that each setting fills."""
VALUES = {
    "effect": "NoSchedule",
    "imagePullPolicy": "Always",
    "mountPath": "/a",
    "nodeAffinityPolicy": "Honor",
    "nodeTaintsPolicy": "Honor",
    "operator": "Exists",
    "restartPolicy": "Always",
    "whenUnsatisfiable": "DoNotSchedule",
}
"""Valid values of fields that do not accept every text."""
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@cache
def pod() -> Document:
    schema = crd_schema("rayclusters")["properties"]["spec"]
    for name in ("headGroupSpec", "template", "spec"):
        schema = schema["properties"][name]
    return schema


def kubernetes(setting: str) -> Document:
    """Returns Kubernetes' schema of a setting."""
    schema = pod()
    for step in (*CONTAINER, setting) if setting in PROBES else FIELDS[setting]:
        schema = schema["items"] if step == 0 else schema["properties"][step]
    return schema


def chart(part: str, setting: str) -> jsonschema.Draft7Validator:
    """Returns a validator of the chart's schema of a setting."""
    schema = SCHEMA
    for name in (*part.replace("workerGroups.cpu", "group").split("."), setting):
        schema = SCHEMA["$defs"]["group"] if name == "group" else schema["properties"][name]
    return jsonschema.Draft7Validator({"$defs": SCHEMA["$defs"], "allOf": [schema]})


def paths(schema: Document, *above: str | int) -> Iterator[Path]:
    """Yields the path of every field, at any depth, except the keys of maps."""
    for name, part in schema.get("properties", {}).items():
        yield (*above, name)
        yield from paths(part, *above, name)
    if "items" in schema:
        yield from paths(schema["items"], *above, 0)


def nested(path: Path, value: Any) -> Any:
    for step in reversed(path):
        value = [value] if step == 0 else {step: value}
    return value


def sample(schema: Document, zero: bool = False, name: str = "", required: bool = True) -> Any:
    """Returns a value with all fields; if `zero`, optional fields have their type's zero value."""
    if schema.get("x-kubernetes-int-or-string"):
        return "0" if zero and "pattern" in schema else "1"
    if "properties" in schema:
        needed = schema.get("required", [])
        return {
            key: sample(part, zero, key, key in (*needed, "image", "name"))
            for key, part in schema["properties"].items()
        }
    if "items" in schema:
        return [sample(schema["items"], zero)]
    if schema["type"] == "object":
        return {"a": sample(schema["additionalProperties"], zero)}
    texts = VALUES.get(name, "a")
    value = {"string": texts, "integer": 1, "boolean": True, "number": 1.5}[schema["type"]]
    return type(value)() if zero and not required else value


SETTINGS = [(part, setting) for part in PARTS for setting in FIELDS] + [
    (part, setting) for part in RAY for setting in PROBES
]


@pytest.mark.parametrize(("part", "setting"), SETTINGS)
def test_every_field_is_accepted(part: str, setting: str) -> None:
    """Sets all fields at once, although a volume or variable may have only one source."""
    errors = chart(part, setting).iter_errors(sample(kubernetes(setting)))
    assert [e.message for e in errors if e.validator != "maxProperties"] == []


@pytest.mark.parametrize(("part", "setting"), SETTINGS)
def test_every_field_is_rejected_if_misspelled(part: str, setting: str) -> None:
    validator, accepted = chart(part, setting), []
    fields = list(paths(kubernetes(setting)))
    assert len(fields) > 4
    for *above, name in fields:
        wrong = f"{name}{str(name)[-1]}"
        errors = validator.iter_errors(nested((*above, wrong), 1))
        if not any(e.validator == "additionalProperties" and wrong in e.message for e in errors):
            accepted.append((*above, wrong))
    assert accepted == []


def test_mlflows_probes_take_every_time_and_number_but_no_handler() -> None:
    properties = kubernetes("livenessProbe")["properties"]
    for probe in PROBES:
        validator = chart("mlflow", probe)
        accepted = {name for name in properties if validator.is_valid({name: 1})}
        assert accepted == {n for n, schema in properties.items() if schema["type"] == "integer"}


@pytest.mark.parametrize("zero", [False, True], ids=["full", "zero"])
@pytest.mark.parametrize("part", RAY)
def test_every_field_is_rendered_as_the_operator_writes_it_back(part: str, zero: bool) -> None:
    settings = {setting: sample(kubernetes(setting), zero) for p, setting in SETTINGS if p == part}
    [above, name] = part.split(".")
    values = merged({"mlflow": {"auth": {"existingSecret": "s"}}}, {above: {name: settings}})
    done = template(given=values, more=("--skip-schema-validation",))
    assert done.returncode == 0, done.stderr
    rendered = kind(documents(done.stdout), "RayCluster")
    assert crd_errors(rendered) == []
    assert [change for document in rendered for change in changes(document)] == []
