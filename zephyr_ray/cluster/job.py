"""Builds a KubeRay RayJob (v1.7, ray.io/v1) from a profile.

The operator has no webhook and reports an invalid job only as an event, so names, strings,
resources and authentication are valid by construction.
"""

import re
import secrets
from typing import Any

from zephyr_ray.cluster.bundle import FOLDER, RECIPE
from zephyr_ray.cluster.profile import Group, Profile, Workers
from zephyr_ray.lease_owner import JOB_VARIABLE

API, VERSION = "ray.io", "v1"
RAY_VERSION = "2.60.0"
"""Ray version in the image; the operator needs it to enable token authentication."""
NAME_LENGTH = 47
HOME = "/home/zephyr"
PART = "zephyr-ray/part"
"""Label by which the chart's network policies select these pods and the pods of the chart's own
jobs."""
CLIENT = {"zephyr-ray/client": "true"}
"""Label of the pods that the chart's network policies admit to MLflow and the services."""
SUBMITTER = {"cpu": "500m", "memory": "1Gi"}
TMP, SMALL_TMP, HOME_SIZE = "50Gi", "1Gi", "10Gi"
"""Maximum sizes of /tmp (in Ray's pods it holds Ray's logs and spilled objects) and of HOME."""
WAIT_SECONDS = 900
"""Maximum seconds that a job waits for the storage's lease. The driver of a job that exceeded its
deadline holds the lease while its head runs (HEAD_SECONDS), and then until the lease expires."""
RETRY = """export ZEPHYR_ATTEMPT=`date -u +%FT%TZ`; n=0; until "$@"; do code=$?; n=$((n+1)); \
if [ $code = 2 ] || [ $n -gt {limit} ]; then exit $code; fi; sleep $((n*30)); done"""
"""Shell program that repeats its arguments until they succeed, return exit code 2 (user error) or
exceed the retry limit; the chart has the same program. The operator's own retries would repeat user
errors too, each time on a new cluster. ZEPHYR_ATTEMPT is set once, so that the storage's lock
counts all repetitions as one attempt and does not mistake a program that restarts on a lost node
for a newer attempt. It has backticks, because Kubernetes expands "$(" in arguments."""
HEAD_SECONDS = 600
"""Default seconds that the head stays up after the run."""
SUFFIX_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def job_name(recipe: str) -> str:
    """Returns a new DNS-1035 name of at most 47 characters that starts with the recipe's name."""
    clean = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
    clean = clean if clean[:1].isalpha() else f"z-{clean}".rstrip("-")
    suffix = "".join(secrets.choice(SUFFIX_CHARACTERS) for _ in range(5))
    return f"{clean[: NAME_LENGTH - 6].rstrip('-')}-{suffix}"


def ray_job(name: str, profile: Profile) -> dict[str, Any]:
    """Returns the RayJob that runs the recipe in the ConfigMap of the same name."""
    submitter = {
        # The operator adds command and token.
        "name": "ray-job-submitter",
        "resources": {"requests": SUBMITTER, "limits": SUBMITTER},
    }
    spec: dict[str, Any] = {
        # The operator passes it to a shell.
        "entrypoint": f"sh -c '{RETRY.format(limit=profile.backoff_limit)}' retry "
        f"python -m zephyr_ray.pipeline {FOLDER}/{RECIPE} --wait {WAIT_SECONDS}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": 0,
        **_cleanup(profile),
        "submitterPodTemplate": {
            "metadata": {"labels": {**profile.labels, **CLIENT, PART: "submitter"}},
            "spec": restricted_pod(profile, submitter, SMALL_TMP),
        },
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                # The head runs the driver, but no tasks or actors.
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                "template": _template("ray-head", name, profile, profile.head),
            },
            "workerGroupSpecs": [
                {
                    "groupName": group,
                    "replicas": workers.replicas,
                    "minReplicas": workers.replicas,
                    "maxReplicas": workers.replicas,
                    "rayStartParams": {},
                    "template": _template("ray-worker", name, profile, workers),
                }
                for group, workers in profile.workers.items()
            ],
        },
    }
    if profile.active_deadline_seconds:
        spec["activeDeadlineSeconds"] = profile.active_deadline_seconds
    queue = {"kueue.x-k8s.io/queue-name": profile.queue} if profile.queue else {}
    return {
        "apiVersion": f"{API}/{VERSION}",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": profile.labels | queue},
        "spec": spec,
    }


def _cleanup(profile: Profile) -> dict[str, Any]:
    """Returns the fields that delete the pods after the job: the workers, which hold the GPUs, at
    once, and the head later. Kueue requires all pods of the cluster to be deleted together, so
    it allows no separate rules."""
    seconds = profile.ttl_seconds
    if profile.queue:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": seconds or 0}
    rules = [
        {"policy": policy, "condition": {**end, "ttlSeconds": ttl}}
        for end in ({"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"})
        for policy, ttl in (
            ("DeleteWorkers", 0),
            ("DeleteCluster", HEAD_SECONDS if seconds is None else seconds),
        )
    ]
    return {"deletionStrategy": {"deletionRules": rules}}


def restricted_pod(profile: Profile, container: dict[str, Any], tmp: str) -> dict[str, Any]:
    """Returns a one-container pod spec that Pod Security `restricted` admits. Only /tmp, of at most
    the size `tmp`, and HOME are writable."""
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}]
    user, more = {}, {}
    if profile.user:
        group = profile.user.group
        user = {"runAsUser": profile.user.id, "runAsGroup": group, "fsGroup": group}
    if profile.service_account:
        more["serviceAccountName"] = profile.service_account
    if profile.priority_class:
        more["priorityClassName"] = profile.priority_class
    return {
        **more,
        # A head restarted in place would lose its state; with Never the operator replaces it.
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "imagePullSecrets": [{"name": secret} for secret in profile.image_pull_secrets],
        "securityContext": {
            "runAsNonRoot": True,
            **user,
            # Otherwise every start walks all files on the storage.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "image": profile.image,
                **container,
                "env": [{"name": "HOME", "value": HOME}, *container.get("env", [])],
                "volumeMounts": [*mounts, *container.get("volumeMounts", [])],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": tmp}},
            {"name": "home", "emptyDir": {"sizeLimit": HOME_SIZE}},
        ],
    }


def _template(role: str, name: str, profile: Profile, group: Group) -> dict[str, Any]:
    """Returns the pod template of the head or of a worker group."""
    amounts = {"cpu": group.cpu, "memory": group.memory}
    if isinstance(group, Workers) and group.gpu:
        amounts[group.gpu.kind] = str(group.gpu.count)
    container = {
        "name": role,
        "image": (group.image if isinstance(group, Workers) else None) or profile.image,
        # Ray reads CPUs, memory and GPUs from the limits; the memory request must equal the limit.
        "resources": {"requests": amounts, "limits": amounts},
        "env": _environment(name, profile),
        "volumeMounts": [
            {"name": "recipe", "mountPath": FOLDER, "readOnly": True},
            {"name": "storage", "mountPath": profile.storage.folder},
        ],
    }
    pod = restricted_pod(profile, container, TMP)
    pod["volumes"] += [
        {"name": "recipe", "configMap": {"name": name}},
        {"name": "storage", "persistentVolumeClaim": {"claimName": profile.storage.claim}},
    ]
    pod["nodeSelector"] = group.node_selector
    pod["tolerations"] = [t.model_dump(exclude_none=True) for t in group.tolerations]
    return {"metadata": {"labels": {**profile.labels, **CLIENT, PART: "pipeline"}}, "spec": pod}


def _environment(name: str, profile: Profile) -> list[dict[str, Any]]:
    """Returns the environment of head and workers; secrets appear by reference only."""
    plain = {
        JOB_VARIABLE: name,
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # One pod downloads; all pods read.
        "ZEPHYR_CACHE": f"{profile.storage.folder}/cache/weights",
        "HF_HOME": f"{profile.storage.folder}/cache/huggingface",
        **profile.env,
    }
    if profile.mlflow:
        plain["MLFLOW_TRACKING_URI"] = profile.mlflow
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": s.name, "key": s.key}}}
            for name, s in profile.secrets.items()
        ),
    ]
