"""Validates objects against KubeRay's CRDs, made strict: an unknown field is an error."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FOLDER = Path(os.environ.get("KUBERAY_CRDS") or Path(__file__).resolve().parents[2] / "shared/crds")


def crd_errors(plural: str, document: dict[str, Any]) -> list[str]:
    """Returns the violations of KubeRay's schema of ray.io/v1."""
    validator = jsonschema.Draft202012Validator(_strict_schema(plural))
    return [
        f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(document)
    ]


@cache
def crd_schema(plural: str) -> dict[str, Any]:
    """Returns KubeRay's schema of ray.io/v1; skips the test if the CRDs are missing."""
    path = FOLDER / f"ray.io_{plural}.yaml"
    if not path.exists():
        pytest.skip(f"no KubeRay CRDs in {FOLDER}; set KUBERAY_CRDS to their folder")
    crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


@cache
def _strict_schema(plural: str) -> dict[str, Any]:
    schema: dict[str, Any] = _strict(crd_schema(plural))
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    # A property may itself be named "properties", so the keyword is handled separately.
    strict = {k: _strict(v) for k, v in schema.items() if k not in ("properties", "default")}
    if "properties" in schema:
        strict["properties"] = {k: _strict(v) for k, v in schema["properties"].items()}
        if "additionalProperties" not in schema:
            open_ended = schema.get("x-kubernetes-preserve-unknown-fields", False)
            strict["additionalProperties"] = open_ended
    return strict
