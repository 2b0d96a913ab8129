"""Tests what the chart and the overlays render, also against the schemas of Kubernetes and KubeRay
and the Pod Security rules."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_tools import (
    CHART,
    CLUSTER,
    GOLDEN,
    MINORS,
    ROOT,
    SERVE,
    TOOLS,
    containers_of,
    crd_errors,
    helm,
    kind,
    kustomize,
    pod_templates,
    ray_specs,
    render,
    schema_errors,
    template,
    tool,
)
from pod_flags import Node
from pod_flags import environment as pod_environment

from zephyr_ray import recipe as recipes
from zephyr_ray.pipeline import KINDS
from zephyr_ray.preflight import check_processors

PRESETS = {
    "kind": ("values-kind.yaml",),
    "gpu-8": ("values-gpu-8.yaml",),
    "multinode": ("values-multinode.yaml",),
    "everything": (str(GOLDEN / "everything-values.yaml"),),
}


@pytest.fixture(params=PRESETS, name="preset")
def _preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_helm_lint_finds_nothing(preset: str) -> None:
    done = helm("lint", "--strict", str(CHART), *_files(preset))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout and "[ERROR]" not in done.stdout


def test_the_output_is_the_golden_one(preset: str) -> None:
    """After an intended change, run make chart-golden and review the diff."""
    done = template(*PRESETS[preset])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / f"{preset}.yaml").read_text()


@pytest.mark.parametrize("minor", MINORS)
def test_kubernetes_accepts_every_field(preset: str, minor: str) -> None:
    assert schema_errors(render(*PRESETS[preset]), minor) == []


def test_kuberay_accepts_every_field(preset: str) -> None:
    assert crd_errors(render(*PRESETS[preset])) == []


def test_kubernetes_schemas_catch_misspelled_fields() -> None:
    (deployment,) = kind(render(*PRESETS["everything"]), "Deployment")
    wrong = json.loads(json.dumps(deployment).replace('"livenessProbe"', '"livenesProbe"'))
    assert schema_errors([wrong], MINORS[-1])


def test_kuberays_schemas_catch_misspelled_fields() -> None:
    (cluster,) = kind(render(*PRESETS["everything"]), "RayCluster")
    text = json.dumps(cluster)
    assert crd_errors([json.loads(text.replace('"rayStartParams"', '"rayStartParam"'))])
    assert crd_errors([json.loads(re.sub(r'"minReplicas": \d+', '"minReplicas": "two"', text))])


def test_every_pod_passes_pod_security_restricted(preset: str) -> None:
    pods = pod_templates(render(*PRESETS[preset]))
    assert len(pods) >= 4
    for pod in pods:
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= {"emptyDir", "configMap", "persistentVolumeClaim"}
        for container in containers_of(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            assert not any("hostPort" in port for port in container.get("ports", []))


def test_every_container_has_requests_and_limits_with_equal_memory(preset: str) -> None:
    rendered = render(*PRESETS[preset])
    resources = [c["resources"] for p in pod_templates(rendered) for c in containers_of(p)]
    resources += [
        spec["autoscalerOptions"]["resources"]
        for spec in ray_specs(rendered)
        if spec["enableInTreeAutoscaling"]
    ]
    for each in resources:
        assert {"cpu", "memory"} <= set(each["limits"]) == set(each["requests"])
        assert each["limits"]["memory"] == each["requests"]["memory"]


def test_only_the_head_of_an_autoscaled_cluster_mounts_a_token(preset: str) -> None:
    rendered = render(*PRESETS[preset])
    accounts = {d["metadata"]["name"]: d for d in kind(rendered, "ServiceAccount")}
    assert not any(account["automountServiceAccountToken"] for account in accounts.values())
    heads = [
        spec["headGroupSpec"]["template"]["spec"]
        for spec in ray_specs(rendered)
        if spec["enableInTreeAutoscaling"]
    ]
    for pod in pod_templates(rendered):
        assert pod["spec"]["serviceAccountName"] in accounts
        assert pod["spec"]["automountServiceAccountToken"] is (pod["spec"] in heads)
    for head in heads:
        assert head["serviceAccountName"].endswith("-autoscaler")


def test_ray_clusters_meet_the_operators_rules(preset: str) -> None:
    for spec in ray_specs(render(*PRESETS[preset])):
        head = spec["headGroupSpec"]
        assert spec["rayVersion"] == "2.60.0" and spec["authOptions"] == {"mode": "token"}
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "name" not in head.get("headService", {}).get("metadata", {})
        assert head["template"]["spec"]["containers"][0]["name"] == "ray-head"
        if spec["enableInTreeAutoscaling"]:
            assert spec["autoscalerOptions"]["version"] == "v2"
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert group["template"]["spec"]["containers"][0]["name"] == "ray-worker"
        for pod in (head["template"], *(g["template"] for g in spec["workerGroupSpecs"])):
            assert pod["spec"]["restartPolicy"] == "Never"
            labels = pod["metadata"]["labels"]
            assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & set(labels)
            names = {variable["name"] for variable in pod["spec"]["containers"][0]["env"]}
            assert not names & {"RAY_REDIS_ADDRESS", "RAY_AUTH_TOKEN", "RAY_enable_autoscaler_v2"}


def test_gpu_groups_have_gpu_limits_and_the_gpu_image() -> None:
    (spec,) = ray_specs(render(*PRESETS["multinode"]))
    cpu, gpu = (g["template"]["spec"]["containers"][0] for g in spec["workerGroupSpecs"])
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert gpu["image"] == "zephyr-ray:0.1.0-gpu" and cpu["image"] == "zephyr-ray:0.1.0"
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]


def test_names_that_look_like_numbers_stay_strings(tmp_path: Path) -> None:
    values = {
        "fullnameOverride": "z1",
        "image": {"pullSecrets": ["1"]},
        "storage": {"existingClaim": "2", "storageClassName": "3"},
        "workerGroups": {"g1": {"minReplicas": 1, "maxReplicas": 1, "priorityClassName": "4",
                               "resources": {"cpu": "1", "memory": "2Gi"}}},
        "cluster": {"autoscaling": False, "workerGroups": ["g1"]},
        "mlflow": {"auth": {"existingSecret": "5"}},
        "scheduling": {"scheduler": "kueue", "queue": "6", "priorityClass": "7"},
    }  # fmt: skip
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    rendered = render(str(path), release="8")
    assert schema_errors(rendered, MINORS[-1]) == []
    for document in rendered:
        assert all(isinstance(v, str) for v in document["metadata"]["labels"].values())


def test_large_numbers_stay_integers(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    values = {"user": {"id": 1000650000}, "pipeline": {"activeDeadlineSeconds": 31536000}}
    path.write_text(yaml.safe_dump(values))
    (job,) = kind(render("values-kind.yaml", str(path)), "RayJob")
    assert job["spec"]["activeDeadlineSeconds"] == 31536000
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["securityContext"]["runAsUser"] == 1000650000


def test_a_number_of_cpus_may_be_a_number() -> None:
    (spec,) = ray_specs(render(sets=(*CLUSTER, "workerGroups.cpu.resources.cpu=6")))
    limits = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["cpu"] == "6"


def test_the_application_accepts_the_serve_settings() -> None:
    from zephyr_ray.serve.app import ServeSettings

    (service,) = kind(render(*PRESETS["everything"]), "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    assert (module, function) == ("zephyr_ray.serve.app", "build")
    settings = ServeSettings.model_validate(application["args"])
    assert settings.run == Path("/mnt/zephyr/runs/quickstart")
    assert settings.models == ["base", "dpo"] and settings.max_replicas == 2
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    names = {variable["name"] for variable in head["containers"][0]["env"]}
    assert "ZEPHYR_API_KEYS" in names and "MLFLOW_TRACKING_PASSWORD" not in names


def test_pods_that_serve_have_all_of_rays_serve_settings_and_others_none(preset: str) -> None:
    from zephyr_ray.serve.command import RAY_SETTINGS

    for pod in pod_templates(render(*PRESETS[preset])):
        settings = {
            variable["name"]: variable["value"]
            for variable in pod["spec"]["containers"][0]["env"]
            if re.match("RAY_(?!USAGE_STATS_ENABLED|AUTH_TOKEN)", variable["name"])
        }
        serves = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "serve"
        assert settings == (RAY_SETTINGS if serves else {}), pod["metadata"]["labels"]


def test_recipes_are_mounted_under_their_paths() -> None:
    rendered = render(*PRESETS["everything"])
    (recipes,) = [d for d in kind(rendered, "ConfigMap") if "recipes" in d["metadata"]["name"]]
    (spec, *_) = ray_specs(rendered)
    (volume,) = [
        v for v in spec["headGroupSpec"]["template"]["spec"]["volumes"] if v["name"] == "recipes"
    ]
    files = {item["path"]: recipes["data"][item["key"]] for item in volume["configMap"]["items"]}
    assert files["seeds/train.jsonl"] == '{"prompt": "Name three rivers."}\n'
    assert yaml.safe_load(files["mine.yaml"])["name"] == "mine"


def test_no_secret_is_rendered(preset: str) -> None:
    rendered = render(*PRESETS[preset])
    assert not kind(rendered, "Secret")
    for pod in pod_templates(rendered):
        for container in containers_of(pod):
            for variable in container.get("env", []):
                if re.search("PASSWORD|TOKEN|KEY", variable["name"]):
                    assert "value" not in variable, variable["name"]


def test_nothing_is_exposed_by_default() -> None:
    for preset in ("kind", "gpu-8", "multinode"):
        rendered = render(*PRESETS[preset])
        assert not kind(rendered, "Ingress") and not kind(rendered, "HTTPRoute")
        assert {s["spec"]["type"] for s in kind(rendered, "Service")} == {"ClusterIP"}
        assert {s["headGroupSpec"]["serviceType"] for s in ray_specs(rendered)} == {"ClusterIP"}


def test_mlflow_does_not_start_with_a_short_password(tmp_path: Path) -> None:
    """Runs the chart's command with an 11-character password; the docs promise that it fails."""
    (deployment,) = kind(render(*PRESETS["kind"]), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (config,) = [
        d["data"]["auth.ini"]
        for d in kind(render(*PRESETS["kind"]), "ConfigMap")
        if "auth.ini" in d.get("data", {})
    ]
    (tmp_path / "auth.ini").write_text(config.replace("/tmp/", f"{tmp_path}/"))
    account = {"username": "zephyr", "password": "elevenchars", "flask-secret-key": "x"}
    environment = pod_environment(container, Node(tmp_path, {"zephyr-accounts": account}, {}))
    for name, value in environment.items():
        environment[name] = re.sub("(/etc)?/mlflow/", f"{tmp_path}/", value)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "mlflow"), "server", *container["args"]],
        env=os.environ | environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert container["command"] == ["mlflow", "server"]
    assert done.returncode != 0 and "Password must be at least 12 characters" in done.stderr


def test_external_database_and_bucket_need_no_claim() -> None:
    sets = (
        *CLUSTER,
        "mlflow.database.existingSecret=pg",
        "mlflow.artifacts.destination=s3://bucket/mlflow",
        "mlflow.artifacts.endpointUrl=http://minio.storage:9000",
        "mlflow.artifacts.existingSecret=s3",
    )
    rendered = render(sets=sets)
    assert [c["metadata"]["name"] for c in kind(rendered, "PersistentVolumeClaim")] == [
        "zephyr-storage"
    ]
    (deployment,) = kind(rendered, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert {v["name"] for v in pod["volumes"]} == {"config", "tmp"}
    env = {v["name"]: v for v in pod["containers"][0]["env"]}
    uri = env["MLFLOW_BACKEND_STORE_URI"]["valueFrom"]["secretKeyRef"]
    assert uri == {"name": "pg", "key": "uri"}
    assert env["MLFLOW_S3_ENDPOINT_URL"]["value"] == "http://minio.storage:9000"
    (policy,) = [
        p for p in kind(rendered, "NetworkPolicy") if p["metadata"]["name"] == "zephyr-mlflow"
    ]
    ports = [p["port"] for rule in policy["spec"]["egress"] for p in rule["ports"]]
    assert ports == [53, 53, 5432, 9000]


def test_an_external_mlflow_is_used() -> None:
    sets = ("mlflow.enabled=false", "mlflow.trackingUri=http://mlflow.tools:8080")
    rendered = render(sets=sets)
    assert not kind(rendered, "Deployment")
    (spec,) = ray_specs(rendered)
    env = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow.tools:8080"} in env
    (policy,) = [
        p for p in kind(rendered, "NetworkPolicy") if p["metadata"]["name"] == "zephyr-cluster"
    ]
    assert {"ports": [{"port": 8080, "protocol": "TCP"}]} in policy["spec"]["egress"]


@pytest.mark.parametrize(
    ("scheduler", "label", "value"),
    [
        ("kueue", "kueue.x-k8s.io/queue-name", "training"),
        ("volcano", "volcano.sh/queue-name", "training"),
        ("yunikorn", "yunikorn.apache.org/queue", "training"),
        ("kai", "kai.scheduler/queue", "training"),
    ],
)
def test_queue_labels_of_each_scheduler(scheduler: str, label: str, value: str) -> None:
    sets = (f"scheduling.scheduler={scheduler}", "scheduling.queue=training")
    (job,) = kind(render("values-gpu-8.yaml", sets=sets), "RayJob")
    assert job["metadata"]["labels"][label] == value


@pytest.mark.parametrize(
    ("address", "port"), [("redis-0:6379", 6379), ("rediss://10.0.0.5:7000", 7000)]
)
def test_the_port_of_redis_is_open(address: str, port: int) -> None:
    prefix = "ray.gcsFaultTolerance."
    sets = (*CLUSTER, f"{prefix}enabled=true", f"{prefix}redisAddress={address}")
    policies = kind(render(sets=sets), "NetworkPolicy")
    (ray,) = [p for p in policies if p["metadata"]["name"] == "zephyr-cluster"]
    bare = [rule["ports"][0]["port"] for rule in ray["spec"]["egress"] if "to" not in rule]
    assert bare == [port]


def test_a_new_recipe_does_not_touch_the_service() -> None:
    def service(*sets: str) -> dict[str, Any]:
        (document,) = kind(render(sets=(*SERVE, *sets)), "RayService")
        return document

    assert service() == service("recipes.new=x")


def test_an_upgrade_does_not_release_a_queued_job() -> None:
    (job,) = kind(render("values-multinode.yaml"), "RayJob")
    assert "suspend" not in job["spec"]


def test_mig_slices_are_requested_by_name() -> None:
    sets = ("workerGroups.gpu.gpuResource=nvidia.com/mig-3g.40gb",)
    (spec,) = ray_specs(render("values-gpu-8.yaml", sets=sets))
    limits = spec["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/mig-3g.40gb"] == "8" and "nvidia.com/gpu" not in limits


@pytest.mark.parametrize("release", ["zephyr", "a" * 53, "z" + "y" * 40 + "-" + "x" * 11])
def test_names_stay_short_enough(release: str) -> None:
    rendered = render(*PRESETS["everything"], release=release, sets=("pipeline.run=9999",))
    most = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
    for document in rendered:
        name = document["metadata"]["name"]
        assert len(name) <= most.get(document["kind"], 63), name
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_an_older_values_file_still_renders() -> None:
    for path in sorted(GOLDEN.glob("values-*.yaml")):
        assert render(str(path))


def test_the_table_of_values_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "helm" / "table_of_values.py"), "--check"], capture_output=True
    )
    assert done.returncode == 0, "make chart-docs"


def test_the_schemas_fields_of_pods_are_up_to_date() -> None:
    if not (TOOLS / "checks").exists():
        pytest.skip("kubernetes-validate is not in .tools (make chart-tools)")
    done = subprocess.run(
        [sys.executable, str(ROOT / "helm" / "pod_schema.py"), "--check"], capture_output=True
    )
    assert done.returncode == 0, "make chart-schema"


def test_helm_prints_no_warning_about_the_charts_files() -> None:
    """Helm would report a symbolic link at every command."""
    assert template(sets=CLUSTER).stderr == ""


def test_the_manifests_of_kustomize_are_rendered_from_the_chart() -> None:
    values = str(ROOT / "k8s" / "values-base.yaml")
    done = template(values, namespace="zephyr", more=("--skip-tests",))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "k8s" / "base" / "zephyr.yaml").read_text(), "make k8s"
    claims = [f"templates/{name}-pvc.yaml" for name in ("storage", "mlflow")]
    done = template(
        values,
        namespace="zephyr",
        sets=("storage.existingClaim=", "mlflow.storage.existingClaim="),
        more=tuple(part for path in claims for part in ("--show-only", path)),
    )
    assert done.stdout == (ROOT / "k8s" / "namespace" / "claims.yaml").read_text(), "make k8s"


@pytest.mark.parametrize("overlay", ["kind", "gpu", "kueue"])
def test_deleting_an_overlay_keeps_the_namespace_and_the_data(overlay: str) -> None:
    built = kustomize(overlay)
    kept = kustomize(f"{overlay.replace('kueue', 'gpu')}/namespace")
    assert {d["kind"] for d in kept} == {"Namespace", "PersistentVolumeClaim"}
    assert not {d["kind"] for d in kept} & {d["kind"] for d in built}
    assert schema_errors(kept, MINORS[-1]) == []
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pod_templates(built)
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {d["metadata"]["name"] for d in kind(kept, "PersistentVolumeClaim")}


@pytest.mark.parametrize("where", ["kind", "gpu-8", "multinode", "k8s/kind", "k8s/gpu"])
def test_the_pods_of_a_job_have_the_cpus_and_gpus_of_its_recipe(where: str) -> None:
    overlay = where.removeprefix("k8s/")
    rendered = kustomize(overlay) if overlay != where else render(*PRESETS[where])
    (job,) = kind(rendered, "RayJob")
    named = re.findall(r"configs/\S+\.yaml", job["spec"]["entrypoint"])
    recipe = recipes.load(ROOT / (named or ["configs/quickstart.yaml"])[0], KINDS)
    has = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for resource in has:
            has[resource] += group["maxReplicas"] * float(limits.get(resource, 0))
    check_processors(recipe, recipe.stages, has["cpu"], has["nvidia.com/gpu"], where)


@pytest.mark.parametrize("overlay", ["kind", "gpu", "kueue"])
def test_an_overlay_builds_and_is_valid(overlay: str) -> None:
    built = kustomize(overlay)
    assert kind(built, "RayJob")
    assert schema_errors(built, MINORS[-1]) == []
    if overlay == "gpu":
        gpus = [
            c["resources"]["limits"].get("nvidia.com/gpu")
            for p in pod_templates(built)
            for c in p["spec"]["containers"]
        ]
        assert "8" in gpus
    if overlay == "kueue":
        (job,) = kind(built, "RayJob")
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
        assert not [d for d in built if "kueue" in d["apiVersion"]]  # users share its queues
        assert job["spec"]["shutdownAfterJobFinishes"] and "deletionStrategy" not in job["spec"]
    assert crd_errors(built) == []
    [job], [base] = kind(built, "RayJob"), kind(render("values-kind.yaml"), "RayJob")
    retries = base["spec"]["entrypoint"].partition(" python -m ")[0]
    assert job["spec"]["entrypoint"].startswith(retries + " python -m ")


def sizes(job: dict[str, Any]) -> list[Any]:
    """Returns the resources and emptyDirs of a job's head and worker groups."""
    spec = job["spec"]["rayClusterSpec"]
    pods = [
        group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    ]
    return [
        (
            pod["containers"][0]["resources"],
            {v["name"]: v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v},
        )
        for pod in pods
    ]


@pytest.mark.parametrize(("overlay", "preset"), [("gpu", "gpu-8"), ("kueue", "gpu-8")])
def test_an_overlay_has_the_sizes_of_the_preset(overlay: str, preset: str) -> None:
    [built], [chart] = (
        kind(rendered, "RayJob") for rendered in (kustomize(overlay), render(*PRESETS[preset]))
    )
    assert sizes(built) == sizes(chart)


def test_the_dashboard_queries_metrics_that_exist() -> None:
    """Known metrics are our own counters and those in the dashboards that Ray ships."""
    import ray

    board = json.loads((ROOT / "k8s" / "monitoring" / "dashboard.json").read_text())
    queries = [t["expr"] for p in board["panels"] for t in p.get("targets", [])]
    queried = {name for query in queries for name in re.findall(r"\bray_\w+(?={)", query)}
    assert len(queried) >= 8 and "ray_zephyr_requests_total" in queried
    panels = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    theirs = "".join(path.read_text() for path in panels.glob("*.py"))
    ours = "".join(path.read_text() for path in (ROOT / "zephyr_ray" / "serve").glob("*.py"))
    known = set(re.findall(r"\bray_\w+", theirs))
    known |= {f"ray_{name}_total" for name in re.findall(r'Counter\(\s*"(\w+)"', ours)}
    assert queried - known == set()


CHECKOV = {
    "CKV_K8S_43": (".", "images are named by tag, because users build their own"),
    "CKV_K8S_15": (".", "a tag names one version; kind loads images instead of pulling"),
    "CKV_K8S_35": (".", "MLflow, Ray and the gateway read credentials from the environment"),
    "CKV_K8S_40": (".", "the image's user is 1000; user.id sets another"),
    "CKV_K8S_8": ("ray-|submitter|test", "the operator adds Ray's probes; other pods end"),
    "CKV_K8S_9": ("ray-|submitter|test", "the operator adds Ray's probes; other pods end"),
    "CKV_K8S_38": ("ray-head", "the autoscaler in the head calls the API server"),
}
"""Accepted checkov findings: (pattern of resources, reason)."""


def test_checkov_finds_only_accepted_findings(tmp_path: Path) -> None:
    rendered = render(*PRESETS["everything"])
    checked = [d for d in rendered if d["kind"] not in ("RayCluster", "RayJob", "RayService")]
    for number, pod in enumerate(pod_templates(rendered)):
        main = pod["spec"]["containers"][0]["name"]
        if "kind" not in pod and main != "mlflow":  # checked as a Deployment
            metadata = {"name": f"{main}-{number}", **pod["metadata"]}
            checked.append({"apiVersion": "v1", "kind": "Pod", **pod, "metadata": metadata})
    text = [json.dumps({**d, "metadata": {**d["metadata"], "namespace": "lab"}}) for d in checked]
    (tmp_path / "all.yaml").write_text("\n---\n".join(text))
    arguments = ["--framework", "kubernetes", "--skip-download", "--quiet", "--compact"]
    arguments += ["--directory", str(tmp_path), "--output", "json"]
    done = subprocess.run([tool("checkov"), *arguments], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 500 and report["summary"]["parsing_errors"] == 0
    failed = {(c["check_id"], c["resource"]) for c in report["results"]["failed_checks"]}
    unlisted = {f for f in failed if not re.search(CHECKOV.get(f[0], ("^$", ""))[0], f[1])}
    assert unlisted == set()
    assert {check for check, _ in failed} == set(CHECKOV), "unused exceptions"


def _files(preset: str) -> list[str]:
    paths = [p if Path(p).is_absolute() else str(CHART / p) for p in PRESETS[preset]]
    return [part for path in paths for part in ("--values", path)]
