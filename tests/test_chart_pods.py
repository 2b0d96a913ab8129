"""Tests the pod settings that ray.head, worker groups, pipeline.submitter and mlflow share, and
that Ray's container stays first."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_tools import (
    CLUSTER,
    MINORS,
    Document,
    crd_errors,
    kind,
    merged,
    ray_specs,
    render,
    schema_errors,
    template,
    values_errors,
)
from typed_form import changes

PARTS = ("ray.head", "workerGroups.cpu", "pipeline.submitter", "mlflow")
RAY = PARTS[:2]
PROBE = {"exec": {"command": ["ready"]}, "periodSeconds": 7}
CONTAINER = {"name": "logs", "image": "fluent-bit:4", "args": ["-q"]}
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
TERMS = [{"matchExpressions": [{"key": "pool", "operator": "Exists"}]}]
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
AFFINITY = {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": TERMS}}}
VOLUME = {"name": "ca", "configMap": {"name": "company-ca"}}
MOUNT = {"name": "ca", "mountPath": "/etc/ca", "readOnly": True}
VARIABLE = {"name": "TZ", "value": "UTC"}
TOKEN = {"name": "HUB_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
SETTINGS: dict[str, Any] = {
    "nodeSelector": {"pool": "a"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "affinity": AFFINITY,
    "topologySpreadConstraints": [SPREAD],
    "priorityClassName": "high",
    "runtimeClassName": "kata",
    "podLabels": {"team": "research"},
    "podAnnotations": {"sidecar.istio.io/inject": "false"},
    "extraEnv": [VARIABLE, TOKEN],
    "extraVolumes": [VOLUME],
    "extraVolumeMounts": [MOUNT],
    "initContainers": [CONTAINER],
    "sidecars": [CONTAINER],
}


def with_setting(part: str, setting: str, value: Any) -> dict[str, Any]:
    values: Any = {setting: value}
    for name in reversed(part.split(".")):
        values = {name: values}
    return {**values, **{k: v for k, v in BASE.items() if k not in values}} | (
        {"mlflow": {**BASE["mlflow"], **values["mlflow"]}} if "mlflow" in values else {}
    )


BASE: dict[str, Any] = {"mlflow": {"auth": {"existingSecret": "zephyr-accounts"}}}


def pods_of(part: str, rendered: list[Document]) -> list[Document]:
    """Returns the pods of a part in the release's Ray cluster, job and MLflow."""
    if part == "ray.head":
        return [spec["headGroupSpec"]["template"] for spec in ray_specs(rendered)]
    if part == "workerGroups.cpu":
        return [g["template"] for s in ray_specs(rendered) for g in s["workerGroupSpecs"]]
    if part == "pipeline.submitter":
        return [job["spec"]["submitterPodTemplate"] for job in kind(rendered, "RayJob")]
    return [d["spec"]["template"] for d in kind(rendered, "Deployment")]


def rendered_with(folder: Path, part: str, setting: str, value: Any) -> list[Document]:
    """Renders a cluster, a job and MLflow with one setting of one part."""
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(with_setting(part, setting, value)))
    return render(str(path), sets=("pipeline.enabled=true",))


def expected(setting: str, pod: Document, plain: Document) -> tuple[Any, Any]:
    """Returns the actual and the expected value of a setting in the pod."""
    spec, value = pod["spec"], SETTINGS[setting]
    main, before = spec["containers"][0], plain["spec"]["containers"][0]
    if setting in ("podLabels", "podAnnotations"):
        name = setting.removeprefix("pod").lower()
        return pod["metadata"][name], plain["metadata"].get(name, {}) | value
    if setting == "extraEnv":
        return main["env"], before["env"] + value
    if setting == "extraVolumeMounts":
        return main["volumeMounts"], before["volumeMounts"] + value
    if setting == "extraVolumes":
        return spec["volumes"], plain["spec"]["volumes"] + value
    if setting in ("initContainers", "sidecars"):
        key = {"sidecars": "containers"}.get(setting, setting)
        given = [{k: c[k] for k in CONTAINER} for c in spec[key][-1:]]
        return (spec[key][:-1], given), (plain["spec"].get(key, []), value)
    return spec[setting], value


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("part", PARTS)
def test_a_setting_reaches_its_pods_and_no_other(part: str, setting: str, tmp_path: Path) -> None:
    plain = render(sets=(*CLUSTER, "pipeline.enabled=true"))
    rendered = rendered_with(tmp_path, part, setting, SETTINGS[setting])
    pods = pods_of(part, rendered)
    assert len(pods) == (2 if part in RAY else 1)
    for pod, before in zip(pods, pods_of(part, plain), strict=True):
        assert pod["spec"]["containers"][0]["name"] == before["spec"]["containers"][0]["name"]
        actual, wanted = expected(setting, pod, before)
        assert actual == wanted
    others = [(pods_of(p, rendered), pods_of(p, plain)) for p in PARTS if p != part]
    assert all(actual == before for actual, before in others)
    assert schema_errors(rendered, MINORS[-1]) == [] and crd_errors(rendered) == []


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
@pytest.mark.parametrize("part", RAY)
def test_a_probe_of_ray_replaces_the_operators(part: str, probe: str, tmp_path: Path) -> None:
    for pod in pods_of(part, rendered_with(tmp_path, part, probe, PROBE)):
        assert pod["spec"]["containers"][0][probe] == PROBE


def test_ray_has_no_probes_by_default() -> None:
    """The operator adds its own only if the pod has none."""
    for part in RAY:
        for pod in pods_of(part, render(sets=CLUSTER)):
            assert not [key for key in pod["spec"]["containers"][0] if key.endswith("Probe")]


def test_a_probe_of_mlflow_changes_its_timing(tmp_path: Path) -> None:
    rendered = rendered_with(tmp_path, "mlflow", "livenessProbe", {"periodSeconds": 99})
    [pod] = pods_of("mlflow", rendered)
    assert pod["spec"]["containers"][0]["livenessProbe"] == {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": 99,
        "timeoutSeconds": 10,
    }


@pytest.mark.parametrize("part", PARTS)
def test_additional_containers_pass_pod_security_unless_they_say_otherwise(
    part: str, tmp_path: Path
) -> None:
    own = {**CONTAINER, "name": "own", "securityContext": {"readOnlyRootFilesystem": False}}
    for pod in pods_of(part, rendered_with(tmp_path, part, "sidecars", [CONTAINER, own])):
        main, logs, owned = pod["spec"]["containers"]
        assert logs["securityContext"] == main["securityContext"]
        assert owned["securityContext"] == main["securityContext"] | own["securityContext"]


def test_the_containers_of_one_pod_share_the_environment_and_the_mounts(tmp_path: Path) -> None:
    """The migration, too, may need a company's CA certificate to reach the database."""
    rendered = rendered_with(tmp_path, "mlflow", "extraEnv", [VARIABLE])
    [pod] = pods_of("mlflow", rendered)
    assert VARIABLE in pod["spec"]["initContainers"][0]["env"]
    rendered = rendered_with(tmp_path / "..", "mlflow", "extraVolumeMounts", [MOUNT])
    [pod] = pods_of("mlflow", rendered)
    assert MOUNT in pod["spec"]["initContainers"][0]["volumeMounts"]


def test_pods_in_one_zone_keep_their_other_affinity() -> None:
    group = "workerGroups.cpu"
    other = f"{group}.affinity.podAntiAffinity.{REQUIRED}[0].topologyKey=host"
    [spec] = ray_specs(render(sets=(*CLUSTER, other, f"{group}.sameTopology=zone")))
    rendered = spec["workerGroupSpecs"][0]["template"]["spec"]["affinity"]
    assert rendered["podAntiAffinity"] == {REQUIRED: [{"topologyKey": "host"}]}
    [term] = rendered["podAffinity"][REQUIRED]
    assert term["topologyKey"] == "zone"


TWICE = {
    "extraEnv": ([{"name": "HOME", "value": "/"}], "name 'HOME' exists already"),
    "extraVolumes": ([{"name": "tmp", "emptyDir": {}}], "name 'tmp' exists already"),
    "extraVolumeMounts": ([{"name": "tmp", "mountPath": "/tmp"}], "mountPath '/tmp' exists"),
    "sidecars": ([CONTAINER, CONTAINER], "name 'logs' exists already"),
}
"""Entries whose name or path exists already, which the API server would reject."""


@pytest.mark.parametrize("setting", TWICE)
@pytest.mark.parametrize("part", PARTS)
def test_a_duplicate_is_refused(part: str, setting: str, tmp_path: Path) -> None:
    value, message = TWICE[setting]
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(with_setting(part, setting, value)))
    line = refusal(str(path), sets=("pipeline.enabled=true",))
    assert f"{part}.{setting}: {message}" in line


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("extraEnv", [{"name": "RAY_AUTH_TOKEN", "value": "x"}], "RAY_AUTH_TOKEN"),
        ("extraEnv", [{"name": "RAY_REDIS_ADDRESS", "value": "x"}], "is set by the operator"),
        ("sidecars", [{"name": "autoscaler", "image": "x"}], "the operator adds a container"),
        ("extraEnv", [{"name": "HF_TOKEN", "value": "hunter2"}], "use valueFrom with an existing"),
        (
            "sidecars",
            [{**CONTAINER, "env": [{"name": "DB_PASSWORD", "value": "hunter2"}]}],
            "ray.head.sidecars[0].env[0]: DB_PASSWORD would be readable in the cluster",
        ),
    ],
)
def test_names_of_the_operator_and_secrets_are_refused(
    setting: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(with_setting("ray.head", setting, value)))
    line = refusal(str(path))
    assert message in line and "hunter2" not in line


MISSPELLED: dict[str, Any] = {
    "extraEnv": [{"name": "A", "valeu": "b"}],
    "extraVolumes": [{"name": "a", "emptyDirs": {}}],
    "extraVolumeMounts": [{"name": "a", "path": "/a"}],
    "initContainers": [{**CONTAINER, "imagePulPolicy": "Always"}],
    "sidecars": [{"name": "a"}],
    "affinity": {"nodeAfinity": {}},
    "topologySpreadConstraints": [{**SPREAD, "minDomain": 2}],
    "priorityClass": "high",
}


@pytest.mark.parametrize("setting", MISSPELLED)
@pytest.mark.parametrize("part", PARTS)
def test_the_schema_rejects_misspelled_settings(part: str, setting: str) -> None:
    assert values_errors(with_setting(part, setting, MISSPELLED[setting]))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("setting", "name"), [("podLabels", "ray.io/cluster"), ("podAnnotations", "ray.io/ft-enabled")]
)
def test_a_reserved_name_is_refused_where_it_is_set(part: str, setting: str, name: str) -> None:
    done = template(given=with_setting(part, setting, {name: "x"}))
    line = f"{part}.{setting}: the operator or the chart uses {name} itself; remove it"
    assert done.returncode != 0 and line in done.stderr


@pytest.mark.parametrize("part", RAY)
@pytest.mark.parametrize("probe", [{"periodSeconds": 5}, {"htttpGet": {}}, {"exec": "ready"}])
def test_a_probe_of_ray_needs_a_handler(part: str, probe: dict[str, Any]) -> None:
    assert values_errors(with_setting(part, "livenessProbe", probe))
    assert not values_errors(with_setting(part, "livenessProbe", PROBE))


def refusal(*values: str, sets: tuple[str, ...] = ()) -> str:
    done = template(*values, sets=sets)
    assert done.returncode != 0, "helm rendered it"
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    return line


@pytest.mark.parametrize("part", RAY)
def test_settings_are_rendered_as_the_operator_writes_them_back(part: str, tmp_path: Path) -> None:
    """The next upgrade would conflict otherwise; test_chart_form has the rules."""
    given: dict[str, Any] = {
        "extraEnv": [{"name": "EMPTY", "value": ""}],
        "extraVolumes": [{"name": "a", "emptyDir": {"sizeLimit": "2048Mi", "medium": ""}}],
        "initContainers": [{"name": "plain", "image": "i", "args": [], "command": ["a", ""]}],
        "sidecars": [
            {
                "name": "logs",
                "image": "i",
                "ports": [{"name": "http", "containerPort": 80}],
                "resources": {"limits": {"cpu": 1, "memory": "1024Mi"}, "requests": {"cpu": 0.5}},
            }
        ],
        "tolerations": [{"key": "a", "operator": "Exists", "value": ""}],
        "podLabels": {"empty": ""},
    }
    values = with_setting(part, "nodeSelector", {"empty": ""})
    for name, value in given.items():
        values = merged(values, with_setting(part, name, value))
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    rendered = render(str(path), sets=("pipeline.enabled=true",))
    for name in ("RayCluster", "RayJob"):
        assert [change for document in kind(rendered, name) for change in changes(document)] == []
    for pod in pods_of(part, rendered):
        logs = pod["spec"]["containers"][1]["resources"]
        assert logs == {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}
        assert pod["metadata"]["labels"]["empty"] == pod["spec"]["nodeSelector"]["empty"] == ""
        assert pod["spec"]["initContainers"][-1]["command"] == ["a", ""]


def test_settings_of_this_file_are_those_of_the_schema() -> None:
    """A new pod setting must be added to SETTINGS, and so be tested here."""
    schema = json.loads(
        (Path(__file__).parent.parent / "helm/zephyr/values.schema.json").read_text()
    )
    properties = schema["properties"]["pipeline"]["properties"]["submitter"]["properties"]
    assert set(properties) - {"resources", "backoffLimit"} == set(SETTINGS)
