"""Fakes the Kubernetes API for helm: stores what helm sends, and reports field conflicts.

It supports label selectors and server-side apply of complete objects; it validates nothing.
KubeRay's worker groups are an atomic list, owned by one manager: an apply that would change the
list after another manager changed it is a conflict."""

import base64
import json
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from chart_tools import ROOT, Document, tool
from kube_api import Server

KINDS = {
    "v1": ("ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment",),
    "networking.k8s.io/v1": ("Ingress", "NetworkPolicy"),
    "policy/v1": ("PodDisruptionBudget",),
    "rbac.authorization.k8s.io/v1": ("Role", "RoleBinding"),
    "ray.io/v1": ("RayCluster", "RayJob", "RayService"),
    "monitoring.coreos.com/v1": ("PodMonitor",),
    "gateway.networking.k8s.io/v1": ("HTTPRoute",),
}
GROUPS = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"),
          "RayService": ("spec", "rayClusterConfig")}  # fmt: skip


MAGIC = b"k8s\0"
"""Prefix of Kubernetes' protobuf encoding, in which helm writes its releases."""


class HelmApi:
    def __init__(self) -> None:
        self.objects: dict[str, Document] = {}
        """Objects by path."""
        self.owners: dict[str, str] = {}
        """Manager of the worker groups of a Ray object, by path."""
        self.server = Server(("127.0.0.1", 0), _Handler)
        self.server.api = self  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def helm(
        self, *arguments: str, home: Path, folder: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Runs helm in a folder, in the namespace lab."""
        server = ("--kube-apiserver", f"http://127.0.0.1:{self.server.server_port}")
        command = [tool("helm"), *arguments, "--namespace", "lab", *server]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env={"HOME": str(home)}
        )

    def get(self, kind: str, name: str) -> Document:
        [match] = [
            document
            for document in self.objects.values()
            if document["kind"] == kind and document["metadata"]["name"] == name
        ]
        return match

    def names(self, kind: str) -> set[str]:
        return {d["metadata"]["name"] for d in self.objects.values() if d["kind"] == kind}

    def write(self, kind: str, name: str, manager: str, document: Document) -> None:
        """Stores an object; `manager` becomes the owner of its worker groups if it changed them."""
        [path] = [p for p, d in self.objects.items() if d is self.get(kind, name)]
        if worker_groups(document) != worker_groups(self.objects[path]):
            self.owners[path] = manager
        self.objects[path] = document

    def apply(self, path: str, document: Document, force: bool) -> str:
        """Stores an object that helm applies, or returns the conflict."""
        before = self.objects.get(path)
        changed = before is not None and worker_groups(before) != worker_groups(document)
        if changed and not force and self.owners.get(path, "helm") != "helm":
            return f'conflict with "{self.owners[path]}" using ray.io/v1: .spec.workerGroupSpecs'
        if changed or before is None:
            self.owners[path] = "helm"
        self.objects[path] = document
        return ""


def worker_groups(document: Document) -> Any:
    for key in GROUPS.get(document["kind"], ()):
        document = document[key]
    return document.get("workerGroupSpecs")


def plural(kind: str) -> str:
    return re.sub("y$", "ie", kind.lower()) + ("es" if kind.endswith("Ingress") else "s")


def secret(text: bytes) -> Document:
    """Decodes a Secret, by the field numbers of runtime.Unknown, ObjectMeta and Secret."""
    message = fields(fields(text.removeprefix(MAGIC))[2][0])
    metadata = fields(message[1][0])
    labels = [fields(entry) for entry in metadata.get(11, [])]
    data = [fields(entry) for entry in message[2]]
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": metadata[1][0].decode(),
            "namespace": "lab",
            "labels": {entry[1][0].decode(): entry[2][0].decode() for entry in labels},
        },
        "data": {e[1][0].decode(): base64.b64encode(e[2][0]).decode() for e in data},
    }


def fields(message: bytes) -> dict[int, list[bytes]]:
    """Returns the strings, bytes and messages in a protobuf message, by field number."""
    by_number: dict[int, list[bytes]] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            at += 1
            value |= (message[at - 1] & 127) << shift
            shift += 7
            if message[at - 1] < 128:
                return value

    while at < len(message):
        tag = number()
        size = number()
        if tag & 7 == 2:
            by_number.setdefault(tag >> 3, []).append(message[at : at + size])
            at += size
    return by_number


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...

    def _answer(self, code: int, body: Document) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _fail(self, code: int, reason: str, message: str = "") -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self._answer(code, status | {"reason": reason, "message": message or reason})

    def do_GET(self) -> None:
        api: HelmApi = self.server.api  # type: ignore[attr-defined]
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        version = re.sub("^/apis?/", "", path)
        if path == "/version":
            self._answer(200, {"major": "1", "minor": "37", "gitVersion": "v1.37.0"})
        elif path == "/api":
            self._answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            groups = [
                {"name": v.split("/")[0], "versions": [{"groupVersion": v, "version": "v1"}],
                 "preferredVersion": {"groupVersion": v, "version": "v1"}}
                for v in KINDS if "/" in v
            ]  # fmt: skip
            self._answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif version in KINDS:
            resources = [
                {"name": plural(kind), "kind": kind, "namespaced": True, "singularName": "",
                 "verbs": ["get", "list", "create", "patch", "delete"]}
                for kind in KINDS[version]
            ]  # fmt: skip
            listing = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version}
            self._answer(200, listing | {"resources": resources})
        elif path in api.objects:
            self._answer(200, api.objects[path])
        elif path.endswith("/secrets"):
            wanted = dict(part.split("=") for part in query["labelSelector"][0].split(","))
            items = [
                document
                for stored, document in api.objects.items()
                if stored.startswith(path + "/")
                and wanted.items() <= document["metadata"].get("labels", {}).items()
            ]
            self._answer(200, {"kind": "SecretList", "apiVersion": "v1", "items": items})
        else:
            self._fail(404, "NotFound")

    def do_POST(self) -> None:
        document = self._body()
        self._store(f"{urlsplit(self.path).path}/{document['metadata']['name']}", document)

    def do_PUT(self) -> None:
        self._store(urlsplit(self.path).path, self._body())

    def do_PATCH(self) -> None:
        self._store(urlsplit(self.path).path, self._body())

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        api: HelmApi = self.server.api  # type: ignore[attr-defined]
        self._answer(200, api.objects.pop(urlsplit(self.path).path))

    def _body(self) -> Document:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if text.startswith(MAGIC):
            return secret(text)
        document: Document = yaml.load(text, yaml.CSafeLoader)
        return document

    def _store(self, path: str, document: Document) -> None:
        api: HelmApi = self.server.api  # type: ignore[attr-defined]
        force = parse_qs(urlsplit(self.path).query).get("force") == ["true"]
        if conflict := api.apply(path, document, force):
            self._fail(409, "Conflict", f"Apply failed with 1 conflict: {conflict}")
        else:
            self._answer(200, document)
