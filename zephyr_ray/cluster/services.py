"""Whether what stands beside a run answers: MLflow, and the dashboard of each Ray cluster with its
token. Services inside the cluster are asked through the API server, so nothing need be opened."""

import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from urllib.parse import urlsplit

from zephyr_ray.cluster.checks import CheckResult, bad, good, unknown
from zephyr_ray.cluster.kube import Forbidden, Kube, Missing, Unauthorized
from zephyr_ray.cluster.profile import Profile
from zephyr_ray.errors import Permanent, Temporary

REQUEST_SECONDS = 10.0
DASHBOARD_PORT = 8265
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
"""What MLflow answers only to those it lets in; /health it answers to all."""
ACCOUNT_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
UNREACHABLE = "error trying to reach service"
"""The API server's own words where it cannot reach a pod that is there."""
TOKEN_KEY = "auth_token"
"""The key of the secret that the operator makes for a cluster, under the cluster's name."""


def check_mlflow(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    if not profile.mlflow:
        yield good("none in the profile: runs are tracked in a file on the storage")
        return
    try:
        public = _is_public(kube, profile.mlflow)
    except (Permanent, Temporary) as error:
        if isinstance(error, Forbidden) or UNREACHABLE in str(error):
            raise  # it could not be looked at
        location = f" -n {kube.namespace}" if "." not in profile.mlflow else " of that namespace"
        yield bad(f"{profile.mlflow}: {error}", f"is it up? kubectl get service,pods{location}")
        return
    has_account = (
        profile.secrets.keys() >= set(ACCOUNT_VARIABLES)
        or "MLFLOW_TRACKING_TOKEN" in profile.secrets
    )
    if public:
        yield good(f"{profile.mlflow} answers")
    elif has_account:
        yield good(f"{profile.mlflow} answers, and wants the account that the profile names")
    else:
        yield bad(
            f"{profile.mlflow} wants an account, and the profile names none",
            f"in the profile, secrets: {' and '.join(ACCOUNT_VARIABLES)}, "
            "each {name: SECRET, key: KEY}",
        )


def _is_public(kube: Kube, mlflow: str) -> bool:
    """False where it wants an account. Permanent or Temporary where no MLflow answers."""
    address = urlsplit(mlflow)
    host = (address.hostname or "").removesuffix(".cluster.local").removesuffix(".svc")
    name, _, namespace = host.partition(".")
    if namespace and not (address.hostname or "").endswith((".svc", ".svc.cluster.local")):
        try:
            urllib.request.urlopen(f"{mlflow}{SEARCH}", timeout=REQUEST_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return False
            raise Permanent(f"answers {error.code}; is it MLflow's address?") from None
        except OSError as error:
            raise Temporary(f"no answer from here: {getattr(error, 'reason', error)}") from None
        return True
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    scheme = "https:" if address.scheme == "https" else ""
    path = kube.path("services", f"{scheme}{name}:{port}/proxy{address.path}{SEARCH}")
    if namespace:
        path = path.replace(f"/{kube.namespace}/", f"/{namespace}/", 1)
    try:
        kube.text(path)
    except Unauthorized:
        return False
    return True


def check_dashboards(kube: Kube) -> Iterator[CheckResult]:
    """Ray's API runs code for whoever may use it: it must want the token, and take it."""
    clusters = kube.items(kube.path("ray.io/v1/rayclusters"))
    for cluster in clusters:
        name, head = cluster["metadata"]["name"], (cluster.get("status") or {}).get("head") or {}
        if (cluster.get("status") or {}).get("state") != "ready":
            yield unknown(f"{name} is not ready yet")
            continue
        service = head.get("serviceName") or f"{name}-head-svc"
        yield from _check_dashboard(kube, name, service)
    if not clusters:
        yield unknown("no Ray cluster runs now; looked at when one does")


def _check_dashboard(kube: Kube, name: str, service: str) -> Iterator[CheckResult]:
    path = kube.path("services", f"{service}:{DASHBOARD_PORT}/proxy/api/jobs/")
    if _status(kube, path, None) == 200:
        yield bad(
            f"{name}: the dashboard answers without a token; anybody near it may run code",
            "authOptions: {mode: token} in its spec, with rayVersion 2.52 or newer",
        )
        return
    try:
        data = kube.get(kube.path("secrets", name)).get("data") or {}
        token = b64decode(data.get(TOKEN_KEY, "")).decode().strip()
    except Missing:
        token = ""
    except Forbidden:
        yield unknown(f"{name}: wants a token; you may not read the secret it lies in")
        return
    if not token:
        yield bad(
            f"{name}: secret {name} has no {TOKEN_KEY}",
            "does the operator run? it makes the secret",
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
