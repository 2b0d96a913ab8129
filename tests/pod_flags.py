"""Translates a pod template into flags of `podman run`, as the kubelet would start it.

Unknown fields raise an AssertionError, so that nothing in the chart is dropped silently. It ignores
placement, the ServiceAccount (no pod here has its token), size limits of emptyDirs (the
kubelet evicts instead of limiting), and probes (the test sends their requests itself).
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]
IGNORED_POD = {"serviceAccountName", "enableServiceLinks", "nodeSelector", "tolerations"}
IGNORED_CONTAINER = {
    *("name", "imagePullPolicy", "ports", "startupProbe", "readinessProbe", "livenessProbe"),
    "terminationMessagePolicy",
}
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass
class Node:
    """Plays a node: its folder holds the volumes, its namespace the secrets and ConfigMaps."""

    folder: Path
    secrets: dict[str, dict[str, str]]
    config_maps: dict[str, dict[str, str]]

    def claim(self, name: str) -> Path:
        return self.folder / "claims" / name


def in_order(pod: Document) -> list[Document]:
    """Returns the pods to run in order: one per init container, then the pod without them."""
    spec = {key: value for key, value in pod["spec"].items() if key != "initContainers"}
    first = [
        {"containers": [c], "restartPolicy": "Never"} for c in pod["spec"].get("initContainers", [])
    ]
    return [{**pod, "spec": {**spec, **own}} for own in (*first, {})]


def run_flags(pod: Document, name: str, node: Node) -> list[str]:
    """Returns the arguments of `podman run`: flags, image, command arguments."""
    spec = pod["spec"]
    (container,) = spec["containers"]
    security = {**spec["securityContext"], **container["securityContext"]}
    flags = [f"--name={name}", f"--hostname={name}", "--pull=never"]
    flags += _security(security)
    flags += _limits(container["resources"])
    flags += [f"--env={key}={value}" for key, value in environment(container, node).items()]
    flags += _volumes(spec.get("volumes", []), container, name, node, security["fsGroup"])
    flags.append(f"--restart={'no' if spec.get('restartPolicy') == 'Never' else 'always'}")
    flags.append(f"--stop-timeout={spec.get('terminationGracePeriodSeconds', 30)}")
    if container.get("command"):
        flags.append(f"--entrypoint={json.dumps(expanded(container, 'command', node))}")
    assert spec["automountServiceAccountToken"] is False, "there is no API server here"
    _nothing_left(spec, IGNORED_POD | _POD)
    _nothing_left(container, IGNORED_CONTAINER | _CONTAINER)
    return [*flags, container["image"], *expanded(container, "args", node)]


_POD = {"containers", "securityContext", "volumes", "restartPolicy"} | {
    "terminationGracePeriodSeconds",
    "automountServiceAccountToken",
}
_CONTAINER = {"image", "command", "args", "env", "resources", "securityContext", "volumeMounts"}


def _nothing_left(part: Document, known: set[str]) -> None:
    assert not set(part) - known, f"not translated: {sorted(set(part) - known)}"


def _security(security: Document) -> list[str]:
    known = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy"}
    known |= {"seccompProfile", "allowPrivilegeEscalation", "readOnlyRootFilesystem"}
    _nothing_left(security, known | {"capabilities"})
    assert security["runAsNonRoot"] and security["runAsUser"] > 0
    # RuntimeDefault is Podman's default.
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    flags = [f"--user={security['runAsUser']}:{security['runAsGroup']}"]
    flags.append(f"--group-add={security['fsGroup']}")
    if security["readOnlyRootFilesystem"]:
        # Podman would mount a tmpfs on /tmp, /run and /var/tmp; the kubelet does not.
        flags += ["--read-only", "--read-only-tmpfs=false"]
    if not security["allowPrivilegeEscalation"]:
        flags.append("--security-opt=no-new-privileges")
    return flags + [f"--cap-drop={name}" for name in security["capabilities"]["drop"]]


def _limits(resources: Document) -> list[str]:
    limits, requests = resources["limits"], resources["requests"]
    _nothing_left(limits, {"cpu", "memory"})
    memory = quantity(limits["memory"])
    # By default, Kubernetes allows no swap and does not limit the number of processes.
    return [
        *(f"--memory={memory}b", f"--memory-swap={memory}b"),
        *("--cpu-period=100000", f"--cpu-quota={round(100_000 * cpus(limits['cpu']))}"),
        *(f"--cpu-shares={max(2, round(1024 * cpus(requests['cpu'])))}", "--pids-limit=-1"),
    ]


def quantity(text: str) -> int:
    number = text.rstrip("KMGi")
    return round(float(number) * UNITS.get(text[len(number) :], 1))


def cpus(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def environment(container: Document, node: Node) -> dict[str, str]:
    values = {}
    for variable in container.get("env", []):
        if "valueFrom" in variable:
            (source,) = variable["valueFrom"]
            assert source == "secretKeyRef", f"not translated: {source}"
            reference = variable["valueFrom"][source]
            values[variable["name"]] = node.secrets[reference["name"]][reference["key"]]
        else:
            values[variable["name"]] = variable["value"]
    return values


def expanded(container: Document, key: str, node: Node) -> list[str]:
    """Returns the words of `command` or `args`, with $(NAME) expanded for existing variables."""
    values = environment(container, node)
    words = container.get(key, [])
    return [re.sub(r"\$\((\w+)\)", lambda m: values.get(m[1], m[0]), word) for word in words]


def _volumes(
    volumes: list[Document], container: Document, pod: str, node: Node, group: int
) -> list[str]:
    """Returns --volume flags for folders of the node. Only claims outlive their pod."""
    own = node.folder / "pods" / pod
    shutil.rmtree(own, ignore_errors=True)
    paths, flags = {}, []
    for volume in volumes:
        (kind,) = set(volume) - {"name"}
        source, path = volume[kind], own / volume["name"]
        if kind == "emptyDir" and source.get("medium") == "Memory":
            flags.append(f"--shm-size={quantity(source['sizeLimit'])}b")
            continue
        if kind == "emptyDir":
            _folder(path, group)
        elif kind == "persistentVolumeClaim":
            path = node.claim(source["claimName"])
            _folder(path, group)
        elif kind == "configMap":
            _config_map(path, node.config_maps[source["name"]], source.get("items"))
        else:
            raise AssertionError(f"not translated: {kind}")
        paths[volume["name"]] = path
    for mount in container["volumeMounts"]:
        _nothing_left(mount, {"name", "mountPath", "readOnly"})
        if mount["mountPath"] == "/dev/shm":
            continue
        mode = "ro" if mount.get("readOnly") else "rw"
        flags.append(f"--volume={paths[mount['name']]}:{mount['mountPath']}:{mode}")
    return flags


def _folder(path: Path, group: int) -> None:
    """Creates a folder like the kubelet with fsGroup: owned by root, group-writable, setgid."""
    if not path.exists():
        path.mkdir(parents=True)
        shutil.chown(path, group=group)
        path.chmod(0o2775)


def _config_map(path: Path, data: dict[str, str], items: list[Document] | None) -> None:
    for item in items or [{"key": key, "path": key} for key in data]:
        file = path / item["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(data[item["key"]])
    path.mkdir(parents=True, exist_ok=True)


# ------------------------------------------------------------------ added by the operator


@dataclass(frozen=True)
class RayPods:
    """Builds the pods of a RayCluster like the KubeRay operator (1.7): adds the start command, the
    environment, the token and /dev/shm, but no init container that waits for the head."""

    name: str
    namespace: str
    spec: Document

    @property
    def head_service(self) -> str:
        return f"{self.name}-head-svc.{self.namespace}.svc.cluster.local"

    def head(self, pod_name: str) -> Document:
        group = self.spec["headGroupSpec"]
        own = {"RAY_ADDRESS": "127.0.0.1:6379"}
        return self._pod(group, "headgroup", pod_name, "ray start --head", {}, own)

    def worker(self, group: Document, pod_name: str) -> Document:
        address = f"{self.head_service}:6379"
        own = {"FQ_RAY_IP": self.head_service, "RAY_IP": self.head_service.split(".")[0]}
        own["RAY_ADDRESS"] = address
        return self._pod(
            group, group["groupName"], pod_name, "ray start", {"address": address}, own
        )

    def _pod(
        self,
        group: Document,
        group_name: str,
        pod_name: str,
        start: str,
        more: dict[str, str],
        own: dict[str, str],
    ) -> Document:
        pod: Document = json.loads(json.dumps(group["template"]))
        container = pod["spec"]["containers"][0]
        limits = container["resources"]["limits"]
        parameters = {
            "num-cpus": str(int(cpus(limits["cpu"]))),
            "memory": str(quantity(limits["memory"])),
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": "52365",
            **more,
            **group["rayStartParams"],
        }
        line = " ".join(f"--{key}={value}" for key, value in sorted(parameters.items()))
        container["command"] = ["/bin/bash", "-c", "--"]
        container["args"] = [f"ulimit -n 65536; {start} --block {line}"]
        values = {
            "RAY_CLUSTER_NAME": self.name,
            "RAY_CLUSTER_NAMESPACE": self.namespace,
            "RAY_CLOUD_INSTANCE_ID": pod_name,
            "RAY_NODE_TYPE_NAME": group_name,
            "RAY_PORT": "6379",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
            **own,
        }
        container["env"] += [{"name": key, "value": value} for key, value in values.items()]
        container["env"] += token(self.spec, self.name)
        container["volumeMounts"].append({"name": "shared-mem", "mountPath": "/dev/shm"})
        memory = {"medium": "Memory", "sizeLimit": limits["memory"]}
        pod["spec"]["volumes"].append({"name": "shared-mem", "emptyDir": memory})
        return pod


def token(spec: Document, cluster: str) -> list[Document]:
    """Returns the variables with the token from the Secret that the operator creates."""
    if spec["authOptions"]["mode"] != "token":
        return []
    secret = {"secretKeyRef": {"name": cluster, "key": "auth_token"}}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": secret},
    ]
