"""Defines the profile: the strict YAML file that describes a cluster and what a run may use of it.
A recipe says nothing about clusters."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from zephyr_ray.errors import Permanent
from zephyr_ray.masking import is_secret
from zephyr_ray.recipe import Recipe
from zephyr_ray.recipe_file import read_yaml, refuse_secrets
from zephyr_ray.settings import Strict, typed

DEFAULT = Path("zephyr-cluster.yaml")
HEAD_MINIMUM_BYTES = 4 * 1024**3
"""Minimum memory of the head, as KubeRay advises; a smaller head runs out of memory and is
killed."""
QUEUED_GROUPS = 7
"""Maximum worker groups per RayJob that Kueue accepts."""
RESERVED_VARIABLES = (
    r"HOME|HF_HOME|ZEPHYR_CACHE|ZEPHYR_JOB|PYTHONUNBUFFERED|MLFLOW_TRACKING_URI|RAY_.*|REDIS_.*"
)
"""Matches variables that the job or the operator sets; a profile must not replace them."""
RESERVED_LABELS = ("app.kubernetes.io/", "ray.io/", "zephyr-ray/")
"""Prefixes of the labels by which the operator and the chart select pods."""

LABEL_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
LABEL_KEY = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"

DnsLabel = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


def _like(pattern: str, example: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"'{value}' is invalid; write it like {example}")
        return value

    return AfterValidator(check)


Cpu = Annotated[
    str,
    BeforeValidator(str),
    _like(r"[1-9][0-9]*(\.[0-9]+)?m?|0\.[0-9]*[1-9]", "4, 0.5 or 500m"),
]
Memory = Annotated[
    str, _like(r"[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)", "8Gi, as Kubernetes does")
]
# The operator counts these as Ray GPUs: names that end in gpu, and NVIDIA's MIG slices.
GpuKind = Annotated[
    str,
    _like(
        r"[a-z0-9.-]+/[a-z0-9.-]*gpu|nvidia\.com/mig-\d+g\.\d+gb",
        "nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-3g.40gb",
    ),
]


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if key.startswith(RESERVED_LABELS):
            raise ValueError(f"the operator and the chart select pods by {key}; rename it")
        if not re.fullmatch(LABEL_KEY, key) or not re.fullmatch(LABEL_VALUE, value):
            raise ValueError(f"'{key}: {value}' is not a label; write it like cost-center: a1")
    return labels


def _address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be http:// or https://, followed by a host")
    _ = parts.port  # raises ValueError if it is not a port
    return address.rstrip("/")


class Toleration(Strict):
    """A Kubernetes toleration."""

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Gpu(Strict):
    kind: GpuKind = "nvidia.com/gpu"
    count: int = Field(ge=1)


class Group(Strict):
    cpu: Cpu
    memory: Memory
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []


class Workers(Group):
    replicas: int = Field(1, ge=1)
    gpu: Gpu | None = None
    """GPUs per replica; none if omitted."""
    image: str | None = Field(None, pattern=r"^[^\s]+$")
    """Image of this group, such as one with CUDA; the profile's if omitted."""


class Storage(Strict):
    claim: DnsName
    """Name of a PersistentVolumeClaim that all pods can mount at once."""
    folder: str = Field("/mnt/zephyr", pattern=r"^(/[A-Za-z0-9._-]+)+$")


class User(Strict):
    id: int = Field(default=1000, ge=1)
    group: int = Field(default=1000, ge=1)


class SecretKey(Strict):
    name: DnsName
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$")


class Profile(Strict):
    image: str = Field(pattern=r"^[^\s]+$")
    storage: Storage
    head: Group = Group(cpu="2", memory="8Gi")
    workers: dict[DnsLabel, Workers] = Field(min_length=1)
    context: str | None = None
    """Context of the kubeconfig; its current one if omitted."""
    namespace: DnsLabel | None = None
    """Namespace of the run; the context's if omitted."""
    image_pull_secrets: list[DnsName] = []
    mlflow: Annotated[str, AfterValidator(_address)] | None = None
    """Address of the MLflow server as the pods see it; without it, runs are tracked in a file."""
    secrets: dict[str, SecretKey] = {}
    """Secret and key that hold each environment variable of the run."""
    env: dict[str, str] = {}
    """More environment variables of the run."""
    labels: Annotated[dict[str, str], AfterValidator(_labels)] = {}
    """More labels of the job and its pods."""
    user: User | None = User()
    """User and group of every container; null leaves the choice to the cluster (OpenShift)."""
    service_account: DnsName | None = None
    """ServiceAccount of the pods, for a cloud identity; no token is mounted."""
    priority_class: DnsName | None = None
    queue: DnsName | None = None
    """Kueue LocalQueue of the job."""
    active_deadline_seconds: int | None = Field(None, ge=1)
    """Maximum seconds of all attempts together; then the operator ends the job. Unlimited if
    omitted."""
    backoff_limit: int = Field(2, ge=0, le=100)
    """Maximum retries of a run that failed, on the same Ray cluster; finished stages are reused. A
    user error is not retried."""
    ttl_seconds: int | None = Field(None, ge=0)
    """Seconds that the head stays up after the run, for inspection; with a queue, all pods. 600 if
    omitted, or 0 with a queue."""

    @property
    def cpus(self) -> float:
        """Total CPUs of all workers as Ray counts them: each worker's rounded up."""
        return sum(w.replicas * math.ceil(quantity(w.cpu)) for w in self.workers.values())

    @property
    def gpus(self) -> int:
        """Total GPUs of all workers."""
        return sum(w.replicas * w.gpu.count for w in self.workers.values() if w.gpu)


def load(path: Path) -> Profile:
    """Reads and validates a profile. Raises Permanent with one line if anything is wrong."""
    if path == DEFAULT and not path.exists():
        raise Permanent(
            f"{path} is missing; write one (docs/kubernetes-client.md) or choose one with --profile"
        )
    raw = read_yaml(path, "profile")
    instead = "name a Secret under secrets (for MLflow: MLFLOW_TRACKING_USERNAME and _PASSWORD)"
    refuse_secrets(raw, str(path), instead)
    profile = typed(Profile, raw, str(path))
    if quantity(profile.head.memory) < HEAD_MINIMUM_BYTES:
        raise Permanent(f"{path}: head.memory is {profile.head.memory}; set it to 4Gi or more")
    for name in {"head", "submitter"} & profile.workers.keys() if profile.queue else ():
        raise Permanent(f"{path}: workers.{name}: Kueue uses this name itself; rename the group")
    if profile.queue and len(profile.workers) > QUEUED_GROUPS:
        raise Permanent(
            f"{path}: {len(profile.workers)} worker groups, but Kueue accepts at most "
            f"{QUEUED_GROUPS}; remove worker groups or the queue setting"
        )
    for setting, names in (("secrets", profile.secrets), ("env", profile.env)):
        for name in names:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise Permanent(
                    f"{path}: {setting}: '{name}' is not a valid variable name; rename it"
                )
            if re.fullmatch(RESERVED_VARIABLES, name):
                raise Permanent(f"{path}: {setting}: the job itself sets {name}; remove it")
    for name in filter(is_secret, profile.env):
        raise Permanent(f"{path}: env: {name} is a secret, which would be stored; {instead}")
    for name in profile.env.keys() & profile.secrets.keys():
        raise Permanent(f"{path}: {name} is in env and in secrets; remove one")
    return profile


def check_secrets(recipe: Recipe, profile: Profile, path: Path) -> None:
    """Raises Permanent if a model needs an API key that the profile has no secret for."""
    for variable, model in recipe.environment_variables().items():
        if variable not in profile.secrets:
            raise Permanent(
                f"{path}: secrets lacks {variable}, which model '{model}' reads; add "
                f"{variable}: {{name: SECRET, key: KEY}}"
            )


def quantity(text: str) -> float:
    """Returns the number that a Kubernetes quantity such as 500m, 8 or 64Gi stands for."""
    from kubernetes.utils import parse_quantity

    return float(parse_quantity(text))
