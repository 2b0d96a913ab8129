"""Finds what KubeRay's operator would change in a Ray object by reading and writing it.

The operator decodes an object into the Go types of KubeRay 1.7 (ray-operator/apis/ray/v1) and of
k8s.io/api, and writes all of it back. Helm applies on the server, where a list without keys, such
as workerGroupSpecs, has one owner: if the operator writes it in another form than Helm sent, the
next upgrade conflicts. The rules:

- The API server adds the CRD's defaults.
- A resource.Quantity is written as a string in its canonical form.
- A field marked `omitempty` loses a zero value, unless its type is a pointer or a struct; a field
  not so marked is always written. A lost zero that is the CRD's default is added again.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from crds import crd_schema

POINTERS = {
    *("allowPrivilegeEscalation", "automountServiceAccountToken", "backoffLimit", "defaultMode"),
    *("enableInTreeAutoscaling", "enableServiceLinks", "expirationSeconds", "hostProcess", "lun"),
    *("maxExpirationSeconds", "minDomains", "minReplicas", "mode", "optional", "priority"),
    *("privileged", "readOnlyRootFilesystem", "replicas", "runAsGroup", "runAsNonRoot"),
    *("runAsUser", "storageClassName", "terminationGracePeriodSeconds", "tolerationSeconds"),
}
"""Scalar fields whose Go type is a pointer, so that a zero value stays."""
WRITTEN = {"rayStartParams": {}, "scaleStrategy": {}}
"""Fields of a worker group that are written even if empty."""


def changes(document: dict[str, Any]) -> list[str]:
    """Returns the paths at which the stored object differs from `document`."""
    schema = crd_schema(document["kind"].lower() + "s")["properties"]["spec"]
    return list(_changes(schema, document["spec"], "spec"))


def canonical(quantity: str) -> str:
    """Writes a quantity as k8s.io/apimachinery/pkg/api/resource does."""
    number, unit = re.fullmatch(r"([0-9.]+)(m|[kMGT]|[KMGT]i|)", quantity).groups()  # type: ignore[union-attr]
    binary, decimal = ["", "Ki", "Mi", "Gi", "Ti", "Pi"], ["m", "", "k", "M", "G", "T", "P"]
    if unit.endswith("i"):
        value = Decimal(number) * 1024 ** binary.index(unit)
        if value >= 1024 and value == int(value):
            return _reduced(int(value), 1024, binary)
        unit, number = "", str(value)
    return _reduced(int(Decimal(number) * 1000 ** decimal.index(unit)), 1000, decimal)


def _reduced(value: int, base: int, suffixes: list[str]) -> str:
    place = 0 if value else suffixes.index("")
    while value and value % base == 0:
        value, place = value // base, place + 1
    return f"{value}{suffixes[place]}"


def _changes(schema: dict[str, Any], value: Any, at: str, field: bool = True) -> Iterator[str]:
    """`field` is false for entries of lists and maps, whose zero values stay."""
    name = re.split(r"[.\[]", at)[-1]
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, str) or value != canonical(value):
            yield f"{at}: {value!r} is not a quantity in canonical form"
    elif isinstance(value, dict):
        properties = schema.get("properties", {})
        for key, part in properties.items():
            if key not in value and "default" in part:
                yield f"{at}.{key}: the default {part['default']!r} is added"
        if "workerGroupSpecs[" in at and {"groupName", "template"} <= set(properties):
            for key in WRITTEN.keys() - value.keys():
                yield f"{at}.{key}: an empty object is added"
        if {"image", "resources"} <= set(properties) and "resources" not in value:
            yield f"{at}.resources: an empty object is added"
        for key, part in value.items():
            inner = properties.get(key) or schema.get("additionalProperties") or {}
            yield from _changes(inner, part, f"{at}.{key}", key in properties)
        if not value and "properties" not in schema and name not in WRITTEN:
            yield f"{at}: the empty map is dropped"
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _changes(schema.get("items", {}), part, f"{at}[{number}]", False)
        if not value:
            yield f"{at}: the empty list is dropped"
    elif field and not value and name not in POINTERS and schema.get("default") != value:
        yield f"{at}: the zero value {value!r} is dropped"
