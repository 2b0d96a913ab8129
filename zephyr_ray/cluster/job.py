"""A RayJob of KubeRay (v1.7, ray.io/v1) from a profile: what the operator checks holds here.

The operator has no webhook: what it does not like shows only as an event. So names, strings,
resources and authentication are made right by construction.
"""

import re
import secrets
import shlex
from typing import Any

from zephyr_ray.cluster.bundle import FOLDER, RECIPE
from zephyr_ray.cluster.profile import Group, Profile, Workers

API, VERSION = "ray.io", "v1"
RAY_VERSION = "2.60.0"
"""Of the image; the operator asks for it before it turns token authentication on."""
NAME_LENGTH = 47
USER = 1000
HOME = "/home/zephyr"
CLIENT = {"zephyr-ray/client": "true"}
"""Pods with this label reach the chart's MLflow and services through its network policies."""
SUBMITTER = {"cpu": "500m", "memory": "1Gi"}
SUFFIX = "abcdefghijklmnopqrstuvwxyz0123456789"


def job_name(recipe: str) -> str:
    """A fresh DNS-1035 name of at most 47 characters that begins with the recipe's."""
    clean = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
    clean = clean if clean[:1].isalpha() else f"z-{clean}".rstrip("-")
    suffix = "".join(secrets.choice(SUFFIX) for _ in range(5))
    return f"{clean[: NAME_LENGTH - 6].rstrip('-')}-{suffix}"


def ray_job(name: str, profile: Profile) -> dict[str, Any]:
    """The RayJob that runs the recipe in the ConfigMap of the same name."""
    entry = ["python", "-m", "zephyr_ray.pipeline", f"{FOLDER}/{RECIPE}"]
    spec: dict[str, Any] = {
        # The operator pastes it into a shell.
        "entrypoint": shlex.join(entry),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": profile.ttl_seconds,
        "backoffLimit": profile.backoff_limit,
        "submitterPodTemplate": _submitter(profile),
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                # The head runs the driver, and no tasks or actors.
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
    metadata: dict[str, Any] = {"name": name}
    if profile.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": profile.queue}
    return {
        "apiVersion": f"{API}/{VERSION}",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": spec,
    }


def restricted_pod(profile: Profile, container: dict[str, Any]) -> dict[str, Any]:
    """A pod of one container that Pod Security `restricted` admits; it writes to /tmp and HOME."""
    # Never: the operator makes a new pod, where a container started again in the old one would be
    # a head without its state.
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}]
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "imagePullSecrets": [{"name": secret} for secret in profile.image_pull_secrets],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # Else every start walks all files of the storage.
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
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "home", "emptyDir": {}}],
    }


def _submitter(profile: Profile) -> dict[str, Any]:
    """Runs `ray job submit` and follows its log; the operator fills in command and token."""
    container = {
        "name": "ray-job-submitter",
        "resources": {"requests": SUBMITTER, "limits": SUBMITTER},
    }
    return {"metadata": {"labels": CLIENT}, "spec": restricted_pod(profile, container)}


def _template(role: str, name: str, profile: Profile, group: Group) -> dict[str, Any]:
    amounts = {"cpu": group.cpu, "memory": group.memory}
    if isinstance(group, Workers) and group.gpu:
        amounts[group.gpu.kind] = str(group.gpu.count)
    container = {
        "name": role,
        "image": (group.image if isinstance(group, Workers) else None) or profile.image,
        # Ray takes its CPUs, memory and GPUs from the limits; memory must be asked for in full.
        "resources": {"requests": amounts, "limits": amounts},
        "env": _environment(profile),
        "volumeMounts": [
            {"name": "recipe", "mountPath": FOLDER, "readOnly": True},
            {"name": "storage", "mountPath": profile.storage.folder},
        ],
    }
    pod = restricted_pod(profile, container)
    pod["volumes"] += [
        {"name": "recipe", "configMap": {"name": name}},
        {"name": "storage", "persistentVolumeClaim": {"claimName": profile.storage.claim}},
    ]
    pod["nodeSelector"] = group.node_selector
    pod["tolerations"] = [t.model_dump(exclude_none=True) for t in group.tolerations]
    return {"metadata": {"labels": CLIENT}, "spec": pod}


def _environment(profile: Profile) -> list[dict[str, Any]]:
    plain = {
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # What is fetched once lies where every pod finds it.
        "ZEPHYR_CACHE": f"{profile.storage.folder}/cache/weights",
        "HF_HOME": f"{profile.storage.folder}/cache/huggingface",
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
