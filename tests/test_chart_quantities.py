"""Tests that a bad quantity is refused in one line that names the setting."""

from typing import Any

import pytest
from chart_tools import Document, merged, template, values_errors

SIZE = "is not a size; write it like 512Mi, 10Gi or 1.5T"
CPU = "is not a number of CPUs; write it like 500m, 0.5 or 4"
AMOUNT = "is not a quantity that the chart accepts; write it like 500m, 2 or 16Gi"
LARGE, ZERO = "is too large; lower it", "is zero; raise it"


def nested(path: str, value: Any) -> Document:
    for name in reversed(path.split(".")):
        value = [value] if name == "0" else {name: value}
    return value


def refusal(*settings: tuple[str, Any]) -> str:
    values: Document = {"mlflow": {"auth": {"existingSecret": "s"}}}
    for path, value in settings:
        values = merged(values, nested(path, value))
    assert values_errors(values) == []
    done = template(given=values)
    assert done.returncode != 0, "helm rendered it"
    [line] = [line for line in done.stderr.splitlines() if "Error:" in line]
    return line.partition("): ")[2]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("ray.tmpSize", "10Gi B", SIZE),
        ("ray.scratchSize", "-1Gi", SIZE),
        ("storage.size", "1.5.0", SIZE),
        ("mlflow.storage.size", "100Ei", LARGE),
        ("ray.head.resources.memory", "0Gi", ZERO),
        ("ray.head.resources.ephemeralStorage", "10gb", SIZE),
        ("ray.autoscaler.resources.memory", "512m", SIZE),
        ("pipeline.submitter.resources.memory", "", SIZE),
        ("mlflow.resources.cpu", -1, CPU),
        ("mlflow.resources.cpuRequest", "0.5m", CPU),
        ("workerGroups.cpu.resources.cpu", "4Gi", CPU),
        ("workerGroups.cpu.resources.cpu", 0, ZERO),
        ("workerGroups.cpu.resources.memory", "9Pi", LARGE),
    ],
)
def test_an_error_names_the_chart_setting_with_a_bad_quantity(
    path: str, value: Any, problem: str
) -> None:
    assert refusal((path, value)) == f"{path}: '{value}' {problem}"


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("sidecars.0.resources.limits.memory", "1e3", AMOUNT),
        ("initContainers.0.resources.requests.cpu", "9300P", LARGE),
        ("extraVolumes.0.emptyDir.sizeLimit", "10Gi B", AMOUNT),
        (
            "extraVolumes.0.ephemeral.volumeClaimTemplate.spec.resources.requests.storage",
            "1Ei",
            LARGE,
        ),
        ("extraEnv.0.valueFrom.resourceFieldRef.divisor", "-1", AMOUNT),
    ],
)
def test_an_error_names_the_pod_field_with_a_bad_quantity(
    path: str, value: str, problem: str
) -> None:
    setting = path.partition(".")[0]
    required_fields = (
        {"name": "a"} if setting in ("extraEnv", "extraVolumes") else {"name": "a", "image": "i"}
    )
    bad_field = nested(path.partition(".0.")[2], value)
    if setting == "extraEnv":
        bad_field["valueFrom"]["resourceFieldRef"]["resource"] = "limits.cpu"
    line = refusal((f"ray.head.{setting}", [required_fields | bad_field]))
    assert line == f"ray.head.{path.replace('.0.', '[0].')}: '{value}' {problem}"


@pytest.mark.parametrize("value", ["8Pi", "0.001", "1.5T", "134217728"])
def test_other_sizes_are_accepted(value: str) -> None:
    """8Pi is near the largest quantity that the chart accepts; 0.001 is the smallest."""
    values = {"mlflow": {"auth": {"existingSecret": "s"}}, "ray": {"tmpSize": value}}
    assert template(given=values).returncode == 0
