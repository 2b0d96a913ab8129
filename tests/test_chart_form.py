"""Tests that the chart renders Ray objects exactly as the operator writes them back."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_tools import CLUSTER, GOLDEN, kind, ray_specs, render, template
from typed_form import canonical, changes

VALUES = {
    "kind": ("values-kind.yaml",),
    "gpu-8": ("values-gpu-8.yaml",),
    "multinode": ("values-multinode.yaml",),
    "everything": (str(GOLDEN / "everything-values.yaml"),),
}
RAY = ("RayCluster", "RayJob", "RayService")


def ray_objects(*values: str, sets: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rendered = render(*values, sets=sets)
    return [document for name in RAY for document in kind(rendered, name)]


@pytest.mark.parametrize("preset", VALUES)
@pytest.mark.parametrize("sets", [(), ("pipeline.enabled=false", "serve.enabled=true")])
def test_the_operator_changes_nothing_by_writing_an_object_back(
    preset: str, sets: tuple[str, ...]
) -> None:
    documents = ray_objects(*VALUES[preset], sets=sets)
    assert documents
    assert [change for document in documents for change in changes(document)] == []


def test_quantities_in_other_forms_and_empty_variables_are_rewritten(tmp_path: Path) -> None:
    values = {
        "ray": {
            "tmpSize": "51200Mi",
            "scratchSize": "1.5Gi",
            "head": {"resources": {"cpu": 0.5, "memory": "5000M"}},
            "env": {"EMPTY": ""},
        },
        "workerGroups": {
            "cpu": {
                "minReplicas": 0,
                "maxReplicas": 1,
                "resources": {"cpu": "2000m", "cpuRequest": "0.25", "memory": "0.1Gi"},
            }
        },
    }
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    [cluster] = ray_objects(str(tmp_path / "values.yaml"), sets=CLUSTER)
    assert changes(cluster) == []
    [group] = cluster["spec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"] == {
        "limits": {"cpu": "2", "memory": "107374182400m"},
        "requests": {"cpu": "250m", "memory": "107374182400m"},
    }
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["resources"]["limits"] == {"cpu": "500m", "memory": "5G"}
    assert [v["emptyDir"] for v in head["volumes"] if "emptyDir" in v] == [
        {"sizeLimit": "50Gi"},
        {"sizeLimit": "1536Mi"},
    ]


@pytest.mark.parametrize(
    ("path", "value", "change"),
    [
        (("scaleStrategy",), None, "an empty object is added"),
        (("numOfHosts",), None, "the default 1 is added"),
        (("rayStartParams",), None, "an empty object is added"),
        (("template", "spec", "containers", 0, "resources", "limits", "cpu"), 4, "not a quantity"),
        (("template", "spec", "volumes", 2, "emptyDir", "sizeLimit"), "1024Mi", "not a quantity"),
        (("template", "spec", "tolerations"), [], "the empty list is dropped"),
        (("template", "spec", "priorityClassName"), "", "the zero value '' is dropped"),
        (("template", "spec", "hostNetwork"), False, "the zero value False is dropped"),
    ],
    ids=str,
)
def test_another_form_is_detected(path: tuple[str | int, ...], value: Any, change: str) -> None:
    [cluster] = yaml.safe_load(yaml.safe_dump(ray_objects(sets=CLUSTER)))
    part = cluster["spec"]["workerGroupSpecs"][0]
    for key in path[:-1]:
        part = part[key]
    part.pop(path[-1]) if value is None else part.update({path[-1]: value})
    [actual] = changes(cluster)
    assert change in actual


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("1024Mi", "1Gi"), ("1.5Gi", "1536Mi"), ("0.1Gi", "107374182400m"), ("0.5Ki", "512"),
        ("2000m", "2"), ("0.5", "500m"), ("1500m", "1500m"), ("1000M", "1G"), ("4.5T", "4500G"),
        ("1073741824", "1073741824"), ("8", "8"), ("1000", "1k"),
    ],
)  # fmt: skip
def test_canonical_quantities(quantity: str, expected: str) -> None:
    """Expectations are what k8s.io/apimachinery 0.36 wrote for these quantities."""
    assert canonical(quantity) == expected


def test_gpus_are_strings() -> None:
    [spec] = ray_specs(render("values-gpu-8.yaml"))
    [_, gpu] = spec["workerGroupSpecs"]
    resources = gpu["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (134217728, "134217728"), (1000000000, "1G"), (0, "0"), ("0", "0"), ("1Pi", "1Pi"),
        ("1.5P", "1500T"), (1.5, "1500m"), ("2048Ti", "2Pi"),
    ],
)  # fmt: skip
def test_amounts_of_a_sidecar_keep_their_meaning(amount: Any, expected: str) -> None:
    """Helm reads numbers as floats."""
    done = template(given=sidecar({"memory": amount}))
    assert done.returncode == 0, done.stderr
    [cluster] = [d for d in yaml.safe_load_all(done.stdout) if d and d["kind"] == "RayCluster"]
    containers = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert containers[-1]["resources"]["limits"] == {"memory": expected}


@pytest.mark.parametrize("amount", ["1Ei", "1e3", "5n", "7u", "9300P", "1 Gi", "-1"])
def test_other_amounts_are_refused(amount: str) -> None:
    done = template(given=sidecar({"memory": amount}))
    assert done.returncode != 0 and f"'{amount}'" in done.stderr


def test_users_volumes_and_variables_are_rendered_as_the_operator_writes_them() -> None:
    """The expected values follow from the Go types of k8s.io/api: readOnly is dropped if false, a
    divisor is always written, storageClassName is a pointer, metadata and resources are structs."""
    volumes = [
        {"name": "a", "persistentVolumeClaim": {"claimName": "a", "readOnly": False}},
        {"name": "b", "csi": {"driver": "d", "volumeAttributes": {"key": ""}}},
        {
            "name": "c",
            "ephemeral": {
                "volumeClaimTemplate": {
                    "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
                }
            },
        },
    ]
    references = [
        {"resource": "limits.cpu"},
        {"resource": "limits.memory", "divisor": "1024Ki"},
    ]
    env = [
        {"name": f"E{number}", "valueFrom": {"resourceFieldRef": reference}}
        for number, reference in enumerate(references)
    ]
    mounts = [{"name": "a", "mountPath": "/a", "readOnly": False}]
    head = {"extraVolumes": volumes, "extraEnv": env, "extraVolumeMounts": mounts}
    values = {"ray": {"head": head}, "mlflow": {"auth": {"existingSecret": "s"}}}
    done = template(given=values)
    assert done.returncode == 0, done.stderr
    [cluster] = [d for d in yaml.safe_load_all(done.stdout) if d and d["kind"] == "RayCluster"]
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    assert pod["volumes"][-3:] == [
        {"name": "a", "persistentVolumeClaim": {"claimName": "a"}},
        volumes[1],
        {
            "name": "c",
            "ephemeral": {
                "volumeClaimTemplate": {
                    "metadata": {},
                    "spec": {
                        "accessModes": ["ReadWriteOnce"],
                        "storageClassName": "",
                        "resources": {},
                    },
                }
            },
        },
    ]
    container = pod["containers"][0]
    divisors = [e["valueFrom"]["resourceFieldRef"]["divisor"] for e in container["env"][-2:]]
    assert divisors == ["0", "1Mi"]
    assert container["volumeMounts"][-1] == {"name": "a", "mountPath": "/a"}


def sidecar(limits: dict[str, Any]) -> dict[str, Any]:
    container = {"name": "logs", "image": "fluent-bit:4", "resources": {"limits": limits}}
    head = {"sidecars": [container]}
    return {"ray": {"head": head}, "mlflow": {"auth": {"existingSecret": "s"}}}
