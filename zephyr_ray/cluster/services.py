"""Checks that MLflow and each Ray dashboard answer and ask for credentials. Services inside the
cluster are reached through the API server's proxy, so no port has to be opened."""

import http.client
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from urllib.parse import urlsplit

from zephyr_ray.cluster.checks import CheckResult, bad, good, unknown
from zephyr_ray.cluster.kube import Forbidden, Kube, Missing, Unauthorized
from zephyr_ray.cluster.profile import Profile
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.masking import remember

REQUEST_SECONDS = 10.0
DASHBOARD_PORT = 8265
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
"""A request that needs credentials if MLflow requires them; /health never does."""
ACCOUNT_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
UNREACHABLE = "error trying to reach service"
"""The API server's message when it cannot connect to an existing pod."""
TOKEN_KEY = "auth_token"
"""Key in the Secret that the operator creates under the Ray cluster's name."""


def check_mlflow(kube: Kube, profile: Profile) -> Iterator[CheckResult]:
    """Checks that MLflow answers, and that the profile has an account if MLflow needs one."""
    if not profile.mlflow:
        yield good("not in the profile: runs are tracked in a file on the storage")
        return
    try:
        public = _is_public(kube, profile.mlflow)
    except (Permanent, Temporary) as error:
        if isinstance(error, Forbidden) or UNREACHABLE in str(error):
            raise  # the request did not get through, so the state is unknown
        location = f" -n {kube.namespace}" if "." not in profile.mlflow else " in that namespace"
        fix = f"check that it is up: kubectl get service,pods{location}"
        yield bad(f"{profile.mlflow}: {error}", fix)
        return
    has_account = (
        profile.secrets.keys() >= set(ACCOUNT_VARIABLES)
        or "MLFLOW_TRACKING_TOKEN" in profile.secrets
    )
    if public:
        yield good(f"{profile.mlflow} answers")
    elif has_account:
        yield good(f"{profile.mlflow} answers and needs an account, which the profile names")
    else:
        yield bad(
            f"{profile.mlflow} needs an account, but the profile names none",
            f"add {' and '.join(ACCOUNT_VARIABLES)} to secrets in the profile, "
            "each as {name: SECRET, key: KEY}",
        )


def _is_public(kube: Kube, mlflow: str) -> bool:
    """Returns whether MLflow answers without an account. Raises Permanent or Temporary if it does
    not answer at all."""
    address = urlsplit(mlflow)
    host = (address.hostname or "").removesuffix(".cluster.local").removesuffix(".svc")
    name, _, namespace = host.partition(".")
    if namespace and not (address.hostname or "").endswith((".svc", ".svc.cluster.local")):
        try:
            urllib.request.urlopen(f"{mlflow}{SEARCH}", timeout=REQUEST_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return False
            message = f"it answers {error.code}; check that this is MLflow's address"
            raise Permanent(message) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Temporary(f"not reachable from this machine: {reason}") from None
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
    """Checks that each dashboard refuses requests without the token and accepts the token: its API
    runs code for anyone it admits."""
    clusters = kube.items(kube.path("ray.io/v1/rayclusters"))
    for cluster in clusters:
        name, head = cluster["metadata"]["name"], (cluster.get("status") or {}).get("head") or {}
        if (cluster.get("status") or {}).get("state") != "ready":
            yield unknown(f"{name} is not ready yet")
            continue
        service = head.get("serviceName") or f"{name}-head-svc"
        yield from _check_dashboard(kube, name, service)
    if not clusters:
        yield unknown("no Ray cluster is running", "run zephyr doctor again while one is")


def _check_dashboard(kube: Kube, name: str, service: str) -> Iterator[CheckResult]:
    path = kube.path("services", f"{service}:{DASHBOARD_PORT}/proxy/api/jobs/")
    if _status(kube, path, None) == 200:
        yield bad(
            f"{name}: the dashboard answers without a token; anyone who reaches it can run code",
            "set authOptions: {mode: token} in its spec, with rayVersion 2.52 or newer",
        )
        return
    try:
        data = kube.get(kube.path("secrets", name)).get("data") or {}
        token = remember(b64decode(data.get(TOKEN_KEY, "")).decode().strip())
    except Missing:
        token = ""
    except Forbidden:
        yield unknown(f"{name}: needs a token, but these credentials cannot read its secret")
        return
    if not token:
        yield bad(
            f"{name}: secret {name} has no {TOKEN_KEY}",
            "check that the operator is running; it creates the secret",
        )
    elif _status(kube, path, token) == 200:
        yield good(f"{name}: the dashboard answers, requires a token and accepts this one")
    else:
        yield bad(f"{name}: the dashboard rejects the token", f"delete the pods of {name}")


def _status(kube: Kube, path: str, token: str | None) -> int:
    """Returns 200, or 401 if Ray refused. Raises Permanent or Temporary for any other answer."""
    # The API server does not forward Authorization; Ray reads this header too.
    headers = {"X-Ray-Authorization": f"Bearer {token}"} if token else {}
    try:
        kube.text(path, headers)
        return 200
    except Forbidden as error:
        # A refusal by the API server names the resource; one by Ray does not.
        if "services" in str(error):
            raise
        return 401
    except Unauthorized:
        return 401
