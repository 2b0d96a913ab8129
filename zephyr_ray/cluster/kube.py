"""Talks to the Kubernetes API with plain objects, and turns failures into one-line errors.

The official client handles the connection: kubeconfig, tokens and their renewal, certificates,
proxies. Its typed methods are not used; objects are addressed by path.
"""

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zephyr_ray.cluster import kubeconfig
from zephyr_ray.cluster.kubeconfig import one_line
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.formatting import shorten
from zephyr_ray.masking import masked, remember

CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
RETRIES = 5
"""Retries of a read that the API server defers (429 or 5xx with Retry-After)."""
OPERATOR_COMMAND = (
    "helm install kuberay-operator kuberay-operator --repo "
    "https://ray-project.github.io/kuberay-helm/ --version 1.7.0 --namespace kuberay-system "
    "--create-namespace"
)
"""Command that installs the operator where the chart's network policies admit it."""
NOT_KUBERNETES = "does not answer as a Kubernetes API server; correct the kubeconfig's server"


class Missing(Permanent):
    """404: the object or its resource type does not exist."""


class Refused(Permanent):
    """Base of refusals that may be temporary: a server that has just started refuses valid
    credentials until its caches are full."""


class Unauthorized(Refused):
    """401: the server does not accept the credentials."""


class Forbidden(Refused):
    """403: the credentials lack the permission."""


class NoRayJobs(Refused):
    """404: the server has no RayJobs API."""


class Gone(Temporary):
    """410: the resource version to watch from is too old; read the object again first."""


class Kube:
    """Connects to one namespace of one cluster."""

    def __init__(self, context: str | None = None, namespace: str | None = None):
        self._context, self._renewing = context, threading.Lock()
        self._client, own_namespace = self._log_in()
        self.namespace = namespace or own_namespace

    def _log_in(self) -> tuple[Any, str]:
        """Reads the kubeconfig; returns the official client and the namespace."""
        import urllib3
        from kubernetes import client

        configuration = client.Configuration()
        # Callers decide about retries; the client's own retries would multiply every timeout.
        configuration.retries = urllib3.Retry(
            RETRIES, connect=0, read=0, redirect=0, status=0, other=0
        )
        configuration.client_go_retries = True
        namespace = kubeconfig.configure(configuration, self._context)
        # The client's own renewal would log failures instead of raising; `_renew` does it.
        configuration.refresh_api_key_hook = None
        self.host = masked(configuration.host)
        with self._typed_errors():
            return client.ApiClient(configuration), namespace

    def _renew(self, refused: Any) -> None:
        """Replaces the refused client: reads token files again and runs exec plugins again."""
        with self._renewing:
            if self._client is not refused:
                return  # another thread has replaced it
            try:
                client, _ = self._log_in()
                # While its file is rewritten, a token may be empty; without one the server would
                # answer 403 to an anonymous user instead of asking for credentials again.
                if _token(refused) and not _token(client):
                    raise Permanent("the kubeconfig's token is now empty; log in again")
                self._client = client
            except Permanent as error:
                raise Unauthorized(
                    f"{self.host} does not accept these credentials; {error}"
                ) from None

    def path(self, kind: str, name: str = "") -> str:
        """Returns the path of an object or a collection in this namespace. `kind` is like 'pods' or
        'ray.io/v1/rayjobs'."""
        group, _, plural = kind.rpartition("/")
        root = f"/apis/{group}" if group else "/api/v1"
        return f"{root}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def get(self, path: str, **query: str) -> dict[str, Any]:
        return self._json("GET", path, query=query)

    def items(self, path: str, **query: str) -> list[dict[str, Any]]:
        """Returns the objects of a list."""
        objects = self.get(path, **query).get("items", "none")
        objects = [] if objects is None else objects  # Go serializes an empty list as null
        if not isinstance(objects, list) or not all(isinstance(o, dict) for o in objects):
            raise Permanent(f"{self.host} {NOT_KUBERNETES}")
        return [{"metadata": {}, **one} for one in objects]

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._json("POST", path, body=body)

    def delete(self, path: str) -> None:
        self._json("DELETE", path, query={"propagationPolicy": "Background"})

    def text(self, path: str, headers: dict[str, str] | None = None, **query: str) -> str:
        with self._open("GET", path, query=query, headers=headers) as response:
            return str(response.data.decode(errors="replace"))

    def lines(self, path: str, seconds: float, **query: str) -> Iterator[str]:
        """Yields lines as they arrive. Raises Temporary after `seconds` without data."""
        with self._open("GET", path, query=query, seconds=seconds) as response:
            for line in response:
                yield line.decode(errors="replace").removesuffix("\n")

    def watch(self, path: str, seconds: int, **query: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (ADDED | MODIFIED | DELETED, object) for about `seconds`. Raises Gone if the
        resource version is too old."""
        query |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        for line in self.lines(path, seconds + READ_SECONDS, **query):
            try:
                event = json.loads(line)
                kind, changed = event["type"], event["object"]
                if kind != "ERROR":
                    changed["metadata"]["resourceVersion"]
            except (ValueError, KeyError, TypeError):
                raise Temporary(f"{self.host} cut off a watch event") from None
            if kind == "ERROR":
                raise self._error(int(changed.get("code", 500)), json.dumps(changed), path)
            if kind != "BOOKMARK":
                yield kind, changed

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        with self._open(method, path, **request) as response:
            try:
                answer = json.loads(response.data)
            except ValueError:
                answer = None
        if not isinstance(answer, dict):
            raise Permanent(f"{self.host} {NOT_KUBERNETES}")
        return answer

    @contextmanager
    def _open(self, method: str, path: str, **request: Any) -> Iterator[Any]:
        """Yields the open response. Raises Permanent or Temporary for an error status."""
        response = None
        try:
            with self._typed_errors(path):
                client = self._client
                response = self._send(client, method, path, **request)
                # Behind the API server's proxy, a 401 is about the service's own credentials.
                if response.status == 401 and "/proxy/" not in path:
                    response.close()
                    self._renew(client)
                    response = self._send(self._client, method, path, **request)
                if response.status >= 400:
                    raise self._error(response.status, response.data.decode(errors="replace"), path)
                yield response
        finally:
            if response is not None:
                response.close()

    def _send(
        self,
        client: Any,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        seconds: float | None = None,
    ) -> Any:
        method, url, sent, body, form = client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={
                "Accept": "application/json, */*",
                "Content-Type": "application/json",
                **(headers or {}),
            },
            body=body,
            auth_settings=["BearerToken"],
        )
        timeouts = (CONNECT_SECONDS, seconds or READ_SECONDS)
        return client.call_api(
            method, url, _strip_credentials(sent), body, form, _request_timeout=timeouts
        ).response

    @contextmanager
    def _typed_errors(self, path: str = "") -> Iterator[None]:
        """Converts every exception of the client and its libraries to Permanent or Temporary."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        try:
            yield
        except (Permanent, Temporary):
            raise
        except ApiException as error:
            if error.status:  # the API server deferred the request more than RETRIES times
                raise self._error(error.status, error.body or "", path) from None
            raise Permanent(f"{self.host}: {one_line(error.reason)}") from None
        except urllib3.exceptions.HTTPError as error:
            # Other TLS failures may be temporary, such as a connection that a restart cuts off.
            cause = getattr(error, "reason", None)
            if any(isinstance(c, ssl.SSLCertVerificationError) for c in getattr(cause, "args", ())):
                raise Permanent(
                    f"{self.host}: its certificate is not trusted; set certificate-authority in "
                    "the kubeconfig to this server's CA"
                ) from None
            raise Temporary(f"cannot reach {self.host} ({_reason(error)})") from None
        except Exception as error:
            raise Permanent(
                f"cannot send a request to {self.host} ({type(error).__name__}: "
                f"{one_line(error)}); correct the kubeconfig"
            ) from None

    def _error(self, status: int, body: str, path: str) -> Permanent | Temporary:
        """Returns the exception for an error status; its type carries the retry policy."""
        try:
            message = json.loads(body)["message"]
        except (ValueError, KeyError, TypeError):
            message = body
        message = shorten(message) or f"status {status}"
        if status == 401:
            return Unauthorized(f"{self.host} does not accept these credentials; log in again")
        if status == 403:
            return Forbidden(f"not allowed: {message}")
        if status == 404:
            if path.startswith("/apis/ray.io") and "not found" not in message.replace(
                "404 page not found", ""
            ):
                return NoRayJobs(
                    "the cluster lacks the RayJobs API (ray.io/v1); install the KubeRay operator "
                    f"({OPERATOR_COMMAND})"
                )
            return Missing(message)
        if status == 410:
            return Gone(message)
        if status == 429 or status >= 500:
            return Temporary(f"{self.host} answers {status}: {message}")
        return Permanent(message)


def _token(client: Any) -> str:
    """Returns the credentials that a client sends; empty if it has none, or certificates."""
    return str(client.configuration.api_key.get("BearerToken", "")).partition(" ")[2].strip()


def _reason(error: BaseException) -> str:
    """Returns the cause inside urllib3's wrappers, like 'Connection refused' or 'timed out'."""
    import urllib3

    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason:
        return _reason(error.reason)
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # it is a TimeoutError too
    if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
        return "timed out"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the connection broke"
    return re.split(r": |\] ", one_line(error))[-1]


def _strip_credentials(headers: dict[str, str]) -> dict[str, str]:
    """Strips whitespace around credentials, as kubectl does. Raises Permanent, without quoting
    them, if a header cannot hold them."""
    for name in [name for name in headers if name.lower().endswith("authorization")]:
        scheme, _, credentials = headers[name].strip().partition(" ")
        headers[name] = f"{scheme} {remember(credentials.strip())}"
        if not headers[name].isascii() or not headers[name].isprintable():
            own = name.lower() == "authorization"
            raise Permanent(
                f"{'the kubeconfig' if own else 'the Ray cluster'}'s token or password contains a "
                "line break or another character that no HTTP header can hold; write it on one line"
            )
    return headers
