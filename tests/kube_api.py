"""Fakes the Kubernetes API over HTTP: objects, watches, logs and proxies in memory, with injected
faults. It checks tokens, access and name conflicts. A test's `operator` acts as KubeRay."""

import json
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TOKEN = "token-of-the-laptop"
HANG_SECONDS = 60.0
COLLECTION = re.compile(r"/(api/v1|apis/[^/]+/[^/]+)(/namespaces/[^/]+)?/[a-z]+$")


@dataclass
class Fault:
    """Makes the next `times` matching requests fail."""

    method: str
    pattern: str
    action: int | str
    """An HTTP status, "hang" until the client gives up, or "drop"."""
    times: int = 1
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    body: Any


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that may wait; the default, 5, is less than a busy machine lets pile up."""


class Api:
    def __init__(self, certificate: Path | None = None) -> None:
        """Serves TLS if given a certificate (with its key in the same file)."""
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.logs: dict[str, list[tuple[str, str]]] = {}
        """(time stamp, text) of each log line, by pod."""
        self.token = TOKEN
        """The token that is accepted."""
        self.denied: set[str] = set()
        """'verb resource' pairs that a SelfSubjectAccessReview denies."""
        self.forbidden: set[str] = set()
        """Patterns of paths that answer 403."""
        self.proxies: dict[str, Callable[[str, dict[str, str]], tuple[int, str]]] = {}
        """Handlers of proxied services, by 'service:port': (path, headers) to (status, text)."""
        self.operator: Callable[[Api, str], None] | None = None
        """Runs in its own thread for each created RayJob."""
        self.operators: list[threading.Thread] = []
        self.operator_error: list[BaseException] = []
        self.opened_logs: list[str] = []
        """Pods whose log a client reads or has read; deleting such a pod loses no line."""
        self._changes: list[tuple[int, str, str, dict[str, Any]]] = []
        self.oldest = 0
        """Oldest version that is still known; watches from an older one get 410."""
        self.changed = threading.Condition()
        self.cold, self.starts = False, 0
        """While cold, the server refuses every request, as if it had not loaded its roles yet."""
        self.refused_cold: list[str] = []
        """Paths of the requests that were refused while cold."""
        self._version = 100
        self.closing = False
        server = Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"api": self}))
        server.daemon_threads = True
        self._server = server
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self.address = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def restart(self) -> None:
        """Breaks all streams; the server is cold until the test resets `cold`."""
        with self.changed:
            self.cold = True
            self.starts += 1
            self.changed.notify_all()

    def kubeconfig(
        self, user: dict[str, Any] | None = None, namespace: str = "team", authority: str = ""
    ) -> str:
        cluster: dict[str, Any] = {"name": "here", "cluster": {"server": self.address}}
        if authority:
            cluster["cluster"]["certificate-authority"] = authority
        context = {"cluster": "here", "user": "me", "namespace": namespace}
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "clusters": [cluster],
                "contexts": [{"name": "lab", "context": context}],
                "users": [{"name": "me", "user": user or {"token": TOKEN}}],
            }
        )

    def put(self, path: str, document: dict[str, Any], kind: str = "") -> dict[str, Any]:
        """Stores a copy of an object and notifies watchers."""
        with self.changed:
            self._version += 1
            document = json.loads(json.dumps(document))
            document["metadata"]["resourceVersion"] = str(self._version)
            kind = kind or ("MODIFIED" if path in self.objects else "ADDED")
            if kind == "DELETED":
                self.objects.pop(path, None)
            else:
                self.objects[path] = document
            self._changes.append((self._version, kind, path, document))
            self.changed.notify_all()
            return document

    def collect_garbage(self) -> None:
        """Deletes the objects whose owners do not exist."""
        with self.changed:
            uids = {
                document["metadata"].get("uid")
                for document in self.objects.values()
                if "metadata" in document
            }
            for path, document in list(self.objects.items()):
                owners = document.get("metadata", {}).get("ownerReferences", [])
                if owners and not any(owner["uid"] in uids for owner in owners):
                    self.put(path, document, "DELETED")

    def status(self, name: str, **status: Any) -> None:
        """Updates a RayJob's status like the operator."""
        path = f"/apis/ray.io/v1/namespaces/team/rayjobs/{name}"
        document = self.objects[path]
        self.put(path, document | {"status": document.get("status", {}) | status})

    def pod(self, name: str, job: str, phase: str = "Running", created: str = "") -> None:
        metadata = {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "creationTimestamp": created or datetime.now(UTC).isoformat(),
            "labels": {"batch.kubernetes.io/job-name": job},
        }
        path = f"/api/v1/namespaces/team/pods/{name}"
        self.put(path, {"metadata": metadata, "status": {"phase": phase}})
        self.logs.setdefault(name, [])

    def phase(self, pod: str, phase: str) -> None:
        path = f"/api/v1/namespaces/team/pods/{pod}"
        self.put(path, self.objects[path] | {"status": {"phase": phase}})

    def log(self, pod: str, text: str, when: str) -> None:
        with self.changed:
            self.logs[pod].append((when, text))
            self.changed.notify_all()

    def sent(self, method: str, pattern: str) -> list[Request]:
        """Returns the requests whose path matches."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert not self.closing, "the test ended before the client sent such a request"
            assert time.monotonic() < end, "the client sent no such request in time"
            time.sleep(0.01)

    def fault(self, method: str, path: str) -> Fault | None:
        with self.changed:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def select(self, collection: str, query: dict[str, str]) -> list[dict[str, Any]]:
        # A cluster-wide list of a namespaced kind covers all namespaces.
        prefix = re.sub(r"/(?=[a-z]+$)", "(/namespaces/[^/]+)?/", re.escape(collection))
        if "/namespaces/" in collection:
            prefix = re.escape(collection)
        return [
            document
            for path, document in sorted(self.objects.items())
            if re.fullmatch(f"{prefix}/[^/]+", path) and matches(document, query)
        ]

    def changes(self, collection: str, query: dict[str, str]) -> Iterator[dict[str, Any] | None]:
        """Yields watch events as they occur, and None after each pause without any."""
        at = int(query["resourceVersion"])
        while not self.closing:
            with self.changed:
                if at < self.oldest:
                    status = {"kind": "Status", "code": 410, "reason": "Expired"}
                    yield {"type": "ERROR", "object": status | {"message": "too old"}}
                    return
                fresh = [c for c in self._changes if c[0] > at]
                if not fresh:
                    self.changed.wait(0.1)
            for version, kind, path, document in fresh:
                at = version
                if path.startswith(f"{collection}/") and matches(document, query):
                    yield {"type": kind, "object": document}
            yield None


def matches(document: dict[str, Any], query: dict[str, str]) -> bool:
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if document["metadata"].get("labels", {}).get(key) != value:
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = part.partition("=")
        place: Any = document
        for name in key.split("."):
            place = place.get(name, {})
        if place != value:
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    api: Api
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; Nagle's algorithm would delay the second by 40 ms.
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, code: int, message: str, headers: dict[str, str] | None = None) -> None:
        status = {"kind": "Status", "status": "Failure", "code": code, "message": message}
        self._answer(code, status, headers)

    def handle(self) -> None:
        # A client may close a connection at any time, even between two requests.
        with suppress(BrokenPipeError, ConnectionResetError):
            super().handle()

    def _serve(self) -> None:
        api, split = self.api, urlsplit(self.path)
        path, query = split.path, dict(parse_qsl(split.query))
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        # Read before the request is recorded: a test that sees it may restart the server at once.
        self.starts = api.starts
        api.requests.append(Request(self.command, path, query, body))
        if not (self.headers.get("Authorization") or "").removeprefix("Bearer").strip():
            return self._refuse(403, f'{path} is forbidden: User "system:anonymous" cannot do that')
        if self.headers.get("Authorization") != f"Bearer {api.token}":
            return self._refuse(401, "Unauthorized")
        if api.cold:
            api.refused_cold.append(path)
            kind = path.split("/")[-1]
            reason = 'RBAC: clusterrole.rbac.authorization.k8s.io "edit" not found'
            return self._refuse(403, f'{kind} is forbidden: User "me" cannot do that: {reason}')
        if fault := api.fault(self.command, path + ("?watch" if "watch" in query else "")):
            if fault.action == "hang":
                # Readable once the client has closed the connection.
                select.select([self.connection], [], [], HANG_SECONDS)
            if fault.action in ("hang", "drop"):
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            message = fault.message or "requested by the test"
            return self._refuse(int(fault.action), message, fault.headers)
        if any(re.search(pattern, path) for pattern in api.forbidden):
            kind = path.split("/")[-1]
            return self._refuse(403, f'{kind} is forbidden: User "me" cannot do that')
        getattr(self, f"_{self.command.lower()}")(path, query, body)

    do_GET = do_POST = do_DELETE = _serve

    def _get(self, path: str, query: dict[str, str], _: Any) -> None:
        api = self.api
        if "/proxy/" in path:
            service, _, rest = path.partition("/services/")[2].partition("/proxy")
            if service not in api.proxies:
                return self._refuse(503, f'no endpoints available for service "{service}"')
            code, text = api.proxies[service](rest, {k.lower(): v for k, v in self.headers.items()})
            return self._answer(code, text)
        if path.endswith("/log"):
            return self._log(path.split("/")[-2], query)
        if query.get("watch") == "true":
            return self._watch(path, query)
        if path in api.objects:
            return self._answer(200, api.objects[path])
        if path.startswith("/apis/ray.io") and "/apis/ray.io/v1" not in api.objects:
            return self._answer(404, "404 page not found\n")
        if COLLECTION.match(path):
            items = api.select(path, query)
            return self._answer(200, {"kind": "List", "metadata": {}, "items": items})
        self._refuse(404, f'"{path.split("/")[-1]}" not found')

    def _post(self, path: str, _: Any, body: Any) -> None:
        api = self.api
        if path.endswith("selfsubjectaccessreviews"):
            attributes = body["spec"]["resourceAttributes"]
            name = "/".join(filter(None, (attributes["resource"], attributes["subresource"])))
            allowed = f"{attributes['verb']} {name}" not in api.denied
            return self._answer(201, body | {"status": {"allowed": allowed}})
        if path.startswith("/apis/ray.io") and "/apis/ray.io/v1" not in api.objects:
            return self._answer(404, "404 page not found\n")
        name = body["metadata"]["name"]
        if f"{path}/{name}" in api.objects:
            return self._refuse(409, f'"{name}" already exists')
        body["metadata"] |= {
            "uid": f"uid-of-{name}",
            "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        created = api.put(f"{path}/{name}", body)
        api.collect_garbage()
        if api.fault("ANSWER", path):
            return self.connection.shutdown(socket.SHUT_RDWR)
        # Before the answer, so that every operator is known when the client returns.
        if path.endswith("/rayjobs") and api.operator:
            thread = threading.Thread(target=self._operate, args=(name,), daemon=True)
            api.operators.append(thread)
            thread.start()
        self._answer(201, created)

    def _operate(self, name: str) -> None:
        try:
            assert self.api.operator
            self.api.operator(self.api, name)
        except BaseException as error:
            self.api.operator_error.append(error)
            path = f"/apis/ray.io/v1/namespaces/team/rayjobs/{name}"
            self.api.put(path, self.api.objects[path], "DELETED")  # ends the client's wait

    def _delete(self, path: str, query: dict[str, str], __: Any) -> None:
        if path not in self.api.objects:
            return self._refuse(404, f'"{path.split("/")[-1]}" not found')
        self.api.put(path, self.api.objects[path], "DELETED")
        if query.get("propagationPolicy") in ("Background", "Foreground"):
            self.api.collect_garbage()
        self._answer(200, {"kind": "Status", "status": "Success"})

    def _start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, text: str) -> None:
        content = text.encode()
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _watch(self, path: str, query: dict[str, str]) -> None:
        self._start_stream()
        end = time.monotonic() + float(query["timeoutSeconds"])
        for event in self.api.changes(path, query):
            if self.api.starts != self.starts:
                return self.connection.shutdown(socket.SHUT_RDWR)
            if event:
                self._chunk(json.dumps(event) + "\n")
            elif time.monotonic() > end:
                break
            elif self.api.fault("CUT", path):
                return self.connection.shutdown(socket.SHUT_RDWR)
        self._chunk("")

    def _log(self, pod: str, query: dict[str, str]) -> None:
        api, path = self.api, f"/api/v1/namespaces/team/pods/{pod}"
        if path not in api.objects:
            return self._refuse(404, f'pods "{pod}" not found')
        api.opened_logs.append(pod)
        self._start_stream()
        sent = 0
        while not api.closing:
            ended = api.objects.get(path, {}).get("status", {}).get("phase") != "Running"
            with api.changed:
                lines = api.logs[pod][sent:]
                if not lines and not ended:
                    api.changed.wait(0.1)
            for when, text in lines:
                sent += 1
                if when >= query.get("sinceTime", "").removesuffix("Z"):
                    self._chunk((f"{when} " if query.get("timestamps") else "") + text + "\n")
            if api.starts != self.starts or api.fault("CUT", f"{pod}/log"):
                return self.connection.shutdown(socket.SHUT_RDWR)
            if not lines and (ended or not query.get("follow")):
                break
        self._chunk("")
