"""Tests release-wide settings: labels, digests, accounts, budgets, claims, permissions."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_tools import (
    CLUSTER,
    GOLDEN,
    MINORS,
    ROOT,
    SERVE,
    Document,
    containers_of,
    crd_errors,
    kind,
    pod_templates,
    ray_specs,
    render,
    schema_errors,
    template,
    values_errors,
)

ALL = (*SERVE, "pipeline.enabled=true")
"""Arguments of --set that enable every part."""
EVERYTHING = str(GOLDEN / "everything-values.yaml")
DIGEST, GPU_DIGEST = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


def selectors(value: Any) -> Iterator[Document]:
    """Yields every label selector below a value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("selector", "podSelector", "namespaceSelector", "labelSelector"):
                yield inner
            yield from selectors(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from selectors(inner)


def test_common_labels_are_on_every_object_and_pod_and_in_no_selector() -> None:
    rendered = render(sets=(*ALL, "commonLabels.team=research"))
    for document in [*rendered, *pod_templates(rendered)]:
        assert document["metadata"]["labels"]["team"] == "research", document["metadata"]
    plain = render(sets=ALL)
    assert list(selectors(rendered)) == list(selectors(plain))
    assert len(list(selectors(plain))) > 20


def test_common_annotations_are_on_every_object_beside_its_own() -> None:
    rendered = render(sets=(*ALL, "commonAnnotations.owner=me"))
    for document in rendered:
        assert document["metadata"]["annotations"]["owner"] == "me", document["metadata"]
    [claim] = [d for d in rendered if d["metadata"]["name"] == "zephyr-storage"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


@pytest.mark.parametrize(
    "label",
    ["ray.io/cluster", "app.kubernetes.io/instance", "app.kubernetes.io/name", "zephyr-ray/client"],
)
def test_common_labels_cannot_be_labels_that_select(label: str) -> None:
    escaped = label.replace(".", "\\.")
    line = refusal(sets=(*CLUSTER, f"commonLabels.{escaped}=x"))
    assert f"commonLabels: the operator or the chart uses {label} itself" in line
    assert template(sets=(*CLUSTER, "commonLabels.example\\.com/team=x")).returncode == 0


def test_digests_pin_both_images() -> None:
    sets = (f"image.digest={DIGEST}", f"image.gpuDigest={GPU_DIGEST}")
    for pod in pod_templates(render("values-gpu-8.yaml", sets=sets)):
        for container in containers_of(pod):
            gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"] == f"zephyr-ray@{GPU_DIGEST if gpu else DIGEST}"


def test_a_tag_beside_a_digest_is_refused() -> None:
    """Nodes ignore a tag beside a digest: an upgrade of the tag would still run the old image."""
    for pinned in (f"image.digest={DIGEST}", f"image.gpuDigest={GPU_DIGEST}"):
        assert "image.tag 2.0 has no effect" in refusal(sets=(*CLUSTER, pinned, "image.tag=2.0"))


def test_a_pinned_image_requires_a_pinned_gpu_image() -> None:
    sets = (f"image.digest={DIGEST}",)
    line = refusal("values-gpu-8.yaml", sets=sets)
    assert "workerGroups.gpu uses the GPU image; set image.gpuDigest" in line
    own = "workerGroups.gpu.image=mine:1"
    assert template("values-gpu-8.yaml", sets=(*sets, own)).returncode == 0


@pytest.mark.parametrize("digest", ["sha256:abc", "a" * 64, "md5:" + "a" * 64])
def test_the_schema_rejects_a_malformed_digest(digest: str) -> None:
    assert values_errors({"image": {"digest": digest}})


@pytest.mark.parametrize("purpose", ["ray", "autoscaler", "mlflow"])
def test_an_existing_account_replaces_the_charts(purpose: str) -> None:
    own, chart = "their-account", f"zephyr-{purpose}"
    plain = render(sets=ALL)
    rendered = render(sets=(*ALL, f"serviceAccounts.{purpose}={own}"))
    accounts = {d["metadata"]["name"] for d in kind(rendered, "ServiceAccount")}
    assert accounts == {d["metadata"]["name"] for d in kind(plain, "ServiceAccount")} - {chart}
    used = [pod["spec"]["serviceAccountName"] for pod in pod_templates(rendered)]
    before = [pod["spec"]["serviceAccountName"] for pod in pod_templates(plain)]
    assert used == [own if name == chart else name for name in before] and own in used


# ------------------------------------------------------------------ budgets


def budgets(*sets: str, values: str = "values-multinode.yaml") -> dict[str, int]:
    """Returns minAvailable of each budget."""
    documents = kind(render(values, sets=sets), "PodDisruptionBudget")
    assert all(d["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow" for d in documents)
    assert all("maxUnavailable" not in d["spec"] for d in documents)
    return {d["metadata"]["name"]: d["spec"]["minAvailable"] for d in documents}


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), {"zephyr-pipeline-workers": 3}),
        (("podDisruptionBudget.pipeline.workers=0",), {"zephyr-pipeline-workers": 4}),
        (("podDisruptionBudget.pipeline.workers=4",), {}),
        (
            ("podDisruptionBudget.pipeline.head=0",),
            {"zephyr-pipeline-head": 1, "zephyr-pipeline-workers": 3},
        ),
        (("podDisruptionBudget.mlflow=0",), {"zephyr-pipeline-workers": 3, "zephyr-mlflow": 1}),
        (("podDisruptionBudget.enabled=false", "podDisruptionBudget.mlflow=0"), {}),
    ],
)
def test_a_budget_lets_a_drain_take_the_given_number(
    sets: tuple[str, ...], expected: dict[str, int]
) -> None:
    """The job has two CPU and two GPU workers."""
    assert budgets(*sets) == expected


def test_by_default_no_budget_blocks_a_drain() -> None:
    """A budget of all pods would block a drain until the part is stopped."""
    for values in ("values-kind.yaml", "values-gpu-8.yaml", "values-multinode.yaml"):
        for name, available in budgets("serve.enabled=true", values=values).items():
            assert available < count_of(name, values), name


def count_of(budget: str, values: str) -> int:
    rendered = render(values, sets=("serve.enabled=true",))
    [component] = re.findall("zephyr-(pipeline|serve)-workers", budget)
    groups = [
        group
        for spec in ray_specs(rendered)
        for group in spec["workerGroupSpecs"]
        if group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    return sum(group["minReplicas"] for group in groups)


# ------------------------------------------------------------------ data, pods, permissions


def test_uninstalling_keeps_the_claims_unless_keep_is_false() -> None:
    def kept(*sets: str) -> set[str]:
        claims = kind(render(sets=(*CLUSTER, *sets)), "PersistentVolumeClaim")
        policy = "helm.sh/resource-policy"
        return {
            d["metadata"]["name"]
            for d in claims
            if d["metadata"].get("annotations", {}).get(policy) == "keep"
        }

    assert kept() == {"zephyr-storage", "zephyr-mlflow"}
    assert kept("storage.keep=false") == {"zephyr-mlflow"}
    assert kept("mlflow.storage.keep=false") == {"zephyr-storage"}


def test_every_empty_volume_has_a_size_and_tmp_ray_is_inside_one() -> None:
    """Unless an autoscaled head and its autoscaler mount a volume at /tmp/ray, the operator mounts
    one without a size."""
    rendered = render(EVERYTHING)
    pods = pod_templates(rendered)
    volumes = [v for pod in pods for v in pod["spec"]["volumes"] if "emptyDir" in v]
    assert len(volumes) > 10 and all(v["emptyDir"]["sizeLimit"] for v in volumes)
    for spec in ray_specs(rendered):
        head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
        for mounts in (head["volumeMounts"], spec["autoscalerOptions"]["volumeMounts"]):
            [mount] = [m for m in mounts if m["mountPath"] == "/tmp/ray"]
            assert mount == {"name": "tmp", "mountPath": "/tmp/ray", "subPath": "ray"}


def test_the_pod_of_helm_test_is_deleted_after_it_succeeds() -> None:
    [pod] = kind(render(sets=CLUSTER), "Pod")
    policy = pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    assert set(policy.split(",")) == {"before-hook-creation", "hook-succeeded"}


def role(*sets: str) -> dict[str, set[str]]:
    """Returns the verbs of the submitters' Role by resource."""
    subject = ("rbac.submitters[0].kind=Group", "rbac.submitters[0].name=researchers")
    [document] = kind(render(sets=(*CLUSTER, *subject, *sets)), "Role")
    return {name: set(r["verbs"]) for r in document["rules"] for name in r["resources"]}


def test_submitters_may_create_jobs_and_change_no_config_map() -> None:
    reading = {"get", "list", "watch"}
    assert role() == {
        "rayjobs": {"create", "delete", *reading},
        "configmaps": {"create"},
        "rayclusters": reading,
        "rayservices": reading,
        "pods": reading,
        "pods/log": reading,
        "services": reading,
        "events": reading,
        "persistentvolumeclaims": reading,
        "resourcequotas": reading,
        "limitranges": reading,
    }
    assert role("rbac.deleteConfigMaps=true")["configmaps"] == {"create", "delete"}
    queue = ("scheduling.scheduler=kueue", "scheduling.queue=q", "cluster.autoscaling=false")
    assert role(*queue)["localqueues"] == reading


def documented_permissions() -> dict[str, set[str]]:
    """Returns the resources that an installer manages, by API group, from the table in the docs."""
    text = (ROOT / "docs" / "kubernetes-platform.md").read_text()
    table = text.partition("## Who may install")[2].partition("\n\n|")[2].partition("\n\n")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines()[2:]]
    groups = {row[0].strip(" `"): set(row[1].strip().split(", ")) for row in rows}
    return {"" if group == "core" else group: names for group, names in groups.items()}


def test_the_docs_list_what_an_installer_may_need_to_create() -> None:
    needed: dict[str, set[str]] = {"": {"secrets"}}  # Helm's own records
    for document in render(EVERYTHING):
        group = document["apiVersion"].rpartition("/")[0]
        name = document["kind"].lower()
        plural = re.sub("y$", "ie", name) + ("es" if name.endswith("s") else "s")
        needed.setdefault(group, set()).add(plural)
    assert documented_permissions() == needed


def test_the_example_in_the_docs_reaches_every_pod(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "kubernetes-platform.md").read_text()
    [example] = re.findall("```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "values.yaml").write_text(example)
    rendered = render(str(tmp_path / "values.yaml"), sets=CLUSTER)
    assert schema_errors(rendered, MINORS[-1]) == [] and crd_errors(rendered) == []
    for pod in [*pod_templates(rendered)[1:]]:
        env = containers_of(pod)[0]["env"]
        bundles = {e["name"] for e in env if e.get("value") == "/etc/company/ca.crt"}
        assert bundles == {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"}
        assert pod["metadata"]["labels"]["cost-center"] == "4711"


@pytest.mark.parametrize("minor", MINORS)
def test_a_hardened_release_is_valid(minor: str, tmp_path: Path) -> None:
    """Sets values of several tests in this file at once."""
    values = {
        "commonLabels": {"team": "a"},
        "image": {"digest": DIGEST, "gpuDigest": GPU_DIGEST},
        "serviceAccounts": {"ray": "a", "autoscaler": "b", "mlflow": "c"},
        "podDisruptionBudget": {"cluster": {"head": 0, "workers": 0}, "mlflow": 0},
    }
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    rendered = render(str(path), sets=ALL)
    assert schema_errors(rendered, minor) == [] and crd_errors(rendered) == []


@pytest.mark.parametrize(
    "values",
    [
        {"commonLabel": {"a": "b"}},
        {"image": {"digests": DIGEST}},
        {"serviceAccounts": {"head": "a"}},
        {"podDisruptionBudget": {"cluster": {"worker": 1}}},
        {"podDisruptionBudget": {"mlflow": -1}},
        {"rbac": {"deleteConfigMap": True}},
        {"networkPolicy": {"dns": {"port": 53}}},
        {"networkPolicy": {"dns": {"ports": ["53"]}}},
    ],
    ids=str,
)
def test_the_schema_rejects_invalid_values(values: dict[str, Any]) -> None:
    assert values_errors(values)


def refusal(*values: str, sets: tuple[str, ...] = ()) -> str:
    done = template(*values, sets=sets)
    assert done.returncode != 0, "helm rendered it"
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    return line
