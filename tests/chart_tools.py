"""Renders the chart with helm and validates it against Kubernetes' schemas and KubeRay's CRDs."""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import crds
import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "zephyr"
GOLDEN = ROOT / "tests" / "golden"
TOOLS = ROOT / ".tools"
MINORS = ("1.34", "1.35", "1.36", "1.37")
"""The four newest minor versions of Kubernetes."""
OPERATOR = "ray.io/v1/RayCluster"
APIS = (
    OPERATOR,
    "monitoring.coreos.com/v1/PodMonitor",
    "gateway.networking.k8s.io/v1/HTTPRoute",
)
CLUSTER = ("mlflow.auth.existingSecret=zephyr-accounts",)
"""--set lines that the defaults need to render."""
SERVE = (*CLUSTER, "serve.enabled=true", "serve.run=quickstart", "serve.apiKeys.existingSecret=k")
Document = dict[str, Any]


def tool(name: str) -> str:
    """Returns a program's path, from PATH or .tools; skips the test if it is in neither."""
    fetched = [TOOLS / "bin" / name, TOOLS / "checks" / "bin" / name]
    for path in (shutil.which(name), *(str(p) for p in fetched if p.exists())):
        if path:
            return path
    pytest.skip(f"{name} is neither on PATH nor in .tools (make chart-tools)")


def helm(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("helm"), *arguments], capture_output=True, text=True, input=stdin)


def template(
    *values: str,
    sets: tuple[str, ...] = (),
    release: str = "zephyr",
    namespace: str = "lab",
    apis: tuple[str, ...] = APIS,
    more: tuple[str, ...] = (),
    chart: Path = CHART,
    given: Document | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `helm template` with values files (names in the chart, or paths), --set lines, and
    `given` values."""
    files = [path if Path(path).is_absolute() else str(CHART / path) for path in values]
    return helm(
        *("template", release, str(chart), "--namespace", namespace, "--kube-version", "1.37.0"),
        *more,
        *(part for api in apis for part in ("--api-versions", api)),
        *(part for path in files for part in ("--values", path)),
        *(part for line in sets for part in ("--set", line)),
        *(() if given is None else ("--values", "-")),
        stdin=None if given is None else json.dumps(given),
    )


@cache
def render(*values: str, sets: tuple[str, ...] = (), release: str = "zephyr") -> list[Document]:
    done = template(*values, sets=sets, release=release)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def documents(text: str) -> list[Document]:
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def kustomize(name: str) -> list[Document]:
    """Builds an overlay of k8s/overlays."""
    folder = str(ROOT / "k8s" / "overlays" / name)
    done = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def kind(rendered: list[Document], name: str) -> list[Document]:
    return [document for document in rendered if document["kind"] == name]


def ray_specs(rendered: list[Document]) -> list[Document]:
    """Returns the Ray cluster spec of every RayCluster, RayJob and RayService."""
    places = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
    specs = []
    for document in rendered:
        if document["kind"] in places:
            spec = document["spec"]
            for key in places[document["kind"]]:
                spec = spec[key]
            specs.append(spec)
    return specs


def pod_templates(rendered: list[Document]) -> list[Document]:
    """Returns every pod that the documents create, as {metadata, spec}."""
    pods = [document for document in rendered if document["kind"] == "Pod"]
    pods += [d["spec"]["template"] for d in kind(rendered, "Deployment")]
    pods += [d["spec"]["submitterPodTemplate"] for d in kind(rendered, "RayJob")]
    for spec in ray_specs(rendered):
        pods.append(spec["headGroupSpec"]["template"])
        pods += [group["template"] for group in spec["workerGroupSpecs"]]
    return pods


def containers_of(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


@cache
def _kubernetes(minor: str) -> tuple[Path, Any]:
    folders = list(
        TOOLS.glob(f"checks/lib/*/site-packages/kubernetes_validate/*/v{minor}.*-strict")
    )
    if not folders:
        pytest.skip("kubernetes-validate is not in .tools (make chart-tools)")
    definitions = json.loads((folders[0] / "_definitions.json").read_text())
    return folders[0], Resource.from_contents(definitions) @ Registry()


@cache
def _kubernetes_validator(minor: str, name: str) -> Any:
    folder, registry = _kubernetes(minor)
    schema = json.loads((folder / name).read_text())
    registry = Resource.from_contents(schema) @ registry
    return jsonschema.Draft202012Validator(schema, registry=registry)


def kubernetes_errors(document: Document, minor: str) -> list[str]:
    group, _, version = document["apiVersion"].rpartition("/")
    api = f"{group.split('.')[0]}-{version}" if group else version
    validator = _kubernetes_validator(minor, f"{document['kind'].lower()}-{api}.json")
    return [f"{e.json_path}: {e.message[:200]}" for e in validator.iter_errors(document)]


def crd_errors(rendered: list[Document]) -> list[str]:
    """Returns what KubeRay's CRDs would reject or silently drop."""
    return [
        error
        for document in rendered
        if document["apiVersion"].startswith("ray.io/")
        for error in crds.crd_errors(document["kind"].lower() + "s", document)
    ]


def schema_errors(rendered: list[Document], minor: str) -> list[str]:
    """Returns what this Kubernetes version would reject, including in pods of custom resources.
    PodMonitor, HTTPRoute and Kueue's queues have no schema here; crd_errors checks Ray's."""
    own = ("ray.io", "monitoring.coreos.com", "gateway.networking.k8s.io", "kueue.x-k8s.io")
    pods = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in pod_templates(rendered)]
    known = [d for d in rendered if d["apiVersion"].partition("/")[0] not in own]
    return [error for document in known + pods for error in kubernetes_errors(document, minor)]


def merged(base: Document, over: Document) -> Document:
    """Merges values like helm: maps recursively, and null deletes."""
    result = dict(base)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


@cache
def default_values() -> Document:
    values: Document = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


def values_errors(over: Document) -> list[str]:
    """Returns the schema violations of the defaults merged with `over`."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    return [
        f"{e.json_path}: {e.message}" for e in validator.iter_errors(merged(default_values(), over))
    ]
