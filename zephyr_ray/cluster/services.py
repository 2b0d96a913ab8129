"""Whether what stands beside a run answers: MLflow, and the dashboard of each Ray cluster with its
token. Services inside the cluster are asked through the API server, so nothing need be opened."""

import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from urllib.parse import urlsplit

from zephyr_ray.cluster.checks import Verdict, bad, good, unknown
from zephyr_ray.cluster.kube import Forbidden, Kube, Missing, Unauthorized
from zephyr_ray.cluster.profile import Profile
from zephyr_ray.errors import Temporary

SECONDS = 10.0
DASHBOARD_PORT = 8265
TOKEN = "auth_token"
"""The key of the secret that the operator makes for a cluster, under the cluster's name."""


def mlflow(kube: Kube, profile: Profile) -> Iterator[Verdict]:
    if not profile.mlflow:
        yield good("none in the profile: runs are tracked in a file on the storage")
        return
    address = urlsplit(profile.mlflow)
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    host = (address.hostname or "").removesuffix(".cluster.local").removesuffix(".svc")
    name, _, namespace = host.partition(".")
    inside = not namespace or (address.hostname or "").endswith((".svc", ".svc.cluster.local"))
    fix = f"is it up? kubectl get service,pods -n {namespace or kube.namespace}"
    if inside:
        path = kube.path("services", f"{name}:{port}/proxy{address.path}/health")
        if namespace:
            path = path.replace(f"/{kube.namespace}/", f"/{namespace}/", 1)
        if address.scheme == "https":
            path = path.replace(f"/{name}:", f"/https:{name}:", 1)
        try:
            kube.text(path)
        except Unauthorized:
            pass  # it answers, and wants the credentials of a run
        except (Missing, Temporary) as error:
            yield bad(f"{profile.mlflow}: {error}", fix)
            return
    else:
        try:
            urllib.request.urlopen(f"{profile.mlflow}/health", timeout=SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                yield bad(f"{profile.mlflow} answers {error.code}", "is it MLflow's address?")
                return
        except OSError as error:
            why = getattr(error, "reason", error)
            yield bad(f"{profile.mlflow} does not answer from here: {why}", fix)
            return
    yield good(f"{profile.mlflow} answers")


def dashboards(kube: Kube) -> Iterator[Verdict]:
    """Ray's API runs code for whoever may use it: it must want the token, and take it."""
    clusters = kube.get(kube.path("ray.io/v1/rayclusters"))["items"]
    for cluster in clusters:
        name, head = cluster["metadata"]["name"], (cluster.get("status") or {}).get("head") or {}
        if (cluster.get("status") or {}).get("state") != "ready":
            yield unknown(f"{name} is not ready yet")
            continue
        service = head.get("serviceName") or f"{name}-head-svc"
        yield from _dashboard(kube, name, service)
    if not clusters:
        yield unknown("no Ray cluster runs now; looked at when one does")


def _dashboard(kube: Kube, name: str, service: str) -> Iterator[Verdict]:
    path = kube.path("services", f"{service}:{DASHBOARD_PORT}/proxy/api/jobs/")
    if (_status(kube, path, None)) == 200:
        yield bad(
            f"{name}: the dashboard answers without a token; anybody near it may run code",
            "authOptions: {mode: token} in its spec, with rayVersion 2.52 or newer",
        )
        return
    try:
        data = kube.get(kube.path("secrets", name)).get("data") or {}
        token = b64decode(data.get(TOKEN, "")).decode().strip()
    except Missing:
        token = ""
    except Forbidden:
        yield unknown(f"{name}: wants a token; you may not read the secret it lies in")
        return
    if not token:
        yield bad(
            f"{name}: secret {name} has no {TOKEN}", "does the operator run? it makes the secret"
        )
    elif _status(kube, path, token) == 200:
        yield good(f"{name}: the dashboard answers, wants a token and takes this one")
    else:
        yield bad(f"{name}: the dashboard does not take the token", f"kubectl delete pod of {name}")


def _status(kube: Kube, path: str, token: str | None) -> int:
    """200, or 401 where Ray refused. Other answers are raised."""
    # The API server keeps Authorization to itself; Ray reads this one too.
    headers = {"X-Ray-Authorization": f"Bearer {token}"} if token else {}
    try:
        kube.text(path, headers)
        return 200
    except Forbidden as error:
        if "services" in str(error):  # the API server's own refusal names the resource
            raise
        return 401
    except Unauthorized:
        return 401
