"""Writes the pod fields of Kubernetes into the chart's schema, as definitions "k8s.TYPE".

python helm/pod_schema.py [--check]. Reads Kubernetes' schemas in .tools (make chart-tools).
"""

import json
import sys
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
ROOT = Path(__file__).parent.parent
FILE = ROOT / "helm" / "zephyr" / "values.schema.json"
MINOR = "1.36"
"""Minor of Kubernetes whose pods the CRDs of the KubeRay operator 1.7 describe."""
PREFIX = "k8s."
WIDTH = 100
TYPES = (
    *("Affinity", "Container", "EnvVar", "LabelSelector", "NetworkPolicyPort", "Probe"),
    *("Toleration", "TopologySpreadConstraint", "Volume", "VolumeMount"),
)
"""Types that the chart's settings refer to."""
DNS_LABEL = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
STRICTER: dict[str, Schema] = {
    "Container": {"required": ["name", "image"]},
    "EnvVarSource": {"minProperties": 1, "maxProperties": 1},
    "Volume": {"minProperties": 2, "maxProperties": 2},
    "Container.image": {"type": "string", "pattern": "^\\S+$"},
    "Container.imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never", None]},
    "Container.name": {"pattern": DNS_LABEL},
    "Container.restartPolicy": {"enum": ["Always", "Never", "OnFailure", None]},
    "EnvVar.name": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    "Probe.failureThreshold": {"minimum": 0},
    "Probe.initialDelaySeconds": {"minimum": 0},
    "Probe.periodSeconds": {"minimum": 0},
    "Probe.successThreshold": {"minimum": 0},
    "Probe.timeoutSeconds": {"minimum": 0},
    "Toleration.effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute", None]},
    "Toleration.operator": {"enum": ["Exists", "Equal", "Gt", "Lt", None]},
    "TopologySpreadConstraint.maxSkew": {"minimum": 1},
    "TopologySpreadConstraint.minDomains": {"minimum": 1},
    "TopologySpreadConstraint.nodeAffinityPolicy": {"enum": ["Honor", "Ignore", None]},
    "TopologySpreadConstraint.nodeTaintsPolicy": {"enum": ["Honor", "Ignore", None]},
    "TopologySpreadConstraint.whenUnsatisfiable": {"enum": ["DoNotSchedule", "ScheduleAnyway"]},
    "Volume.name": {"pattern": DNS_LABEL},
    "VolumeMount.mountPath": {"pattern": "^/"},
}
"""Requirements of Kubernetes that its schema does not state, by type or field."""
SCALARS: dict[str, list[str]] = {
    "IntOrString": ["string", "integer", "null"],
    "Quantity": ["string", "number", "null"],
    "Time": ["string", "null"],
}
CLAIM_METADATA = ("annotations", "finalizers", "labels", "name", "namespace")
"""Fields of ObjectMeta that the CRDs keep in a volumeClaimTemplate."""


def definitions() -> Schema:
    """Returns the definitions of TYPES and of all types in them."""
    pattern = f"checks/lib/*/site-packages/kubernetes_validate/*/v{MINOR}.*-strict"
    [folder] = (ROOT / ".tools").glob(pattern)
    known = {
        name.rpartition(".")[2]: schema
        for name, schema in json.loads((folder / "_definitions.json").read_text())["$defs"].items()
        if name.startswith(("io.k8s.api.core.v1.", "io.k8s.api.networking.v1."))
        or ".apis.meta.v1." in name
    }
    result: Schema = {}
    waiting = list(TYPES)
    while waiting:
        name = waiting.pop()
        if PREFIX + name not in result:
            result[PREFIX + name] = _type(name, known[name], waiting)
    return dict(sorted(result.items()))


def _type(name: str, schema: Schema, waiting: list[str]) -> Schema:
    """Returns a type's definition; adds the types in it to `waiting`."""
    stricter = STRICTER.get(name, {})
    required = stricter.get("required", schema.get("required", []))
    properties = {}
    for field, given in sorted(schema["properties"].items()):
        if name == "ObjectMeta" and field not in CLAIM_METADATA:
            continue
        converted = _field(given, waiting)
        if field in required:
            converted = _not_null(converted)
        properties[field] = converted | STRICTER.get(f"{name}.{field}", {})
    result = {"type": ["object", "null"], "additionalProperties": False, **stricter}
    if required:
        result["required"] = required
    return result | {"properties": properties}


def _field(schema: Schema, waiting: list[str]) -> Schema:
    if "$ref" in schema:
        name = schema["$ref"].rpartition(".")[2]
        if name in SCALARS:
            return {"type": SCALARS[name]}
        waiting.append(name)
        return {"$ref": f"#/$defs/{PREFIX}{name}"}
    result: Schema = {"type": schema["type"]}
    for key in ("items", "additionalProperties"):
        if key in schema:
            result[key] = _not_null(_field(schema[key], waiting))
    return result


def _not_null(schema: Schema) -> Schema:
    if "$ref" in schema:
        return {"allOf": [schema, {"type": "object"}]}
    kinds = [kind for kind in _listed(schema["type"]) if kind != "null"]
    return schema | {"type": kinds[0] if len(kinds) == 1 else kinds}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def dump(value: Any, indent: int = 0, used: int = 0) -> str:
    """Writes JSON with as much on one line as fits."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + used <= WIDTH or not value or not isinstance(value, dict | list):
        return line
    inner = indent + 2
    keys = (
        [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    )
    values = value.values() if isinstance(value, dict) else value
    parts = [
        " " * inner + key + dump(part, inner, inner + len(key) + 1)
        for key, part in zip(keys, values, strict=True)
    ]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}\n" + ",\n".join(parts) + f"\n{' ' * indent}{end}"


def main() -> int:
    before = FILE.read_text()
    schema = json.loads(before)
    own = {name: d for name, d in schema["$defs"].items() if not name.startswith(PREFIX)}
    schema["$defs"] = own | definitions()
    after = dump(schema) + "\n"
    if "--check" in sys.argv:
        return int(before != after)
    FILE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
