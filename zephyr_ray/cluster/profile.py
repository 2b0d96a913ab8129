"""The profile: what a cluster looks like from a laptop, and what a run may take of it. A small
strict YAML file beside the recipes; the recipe itself says nothing about clusters."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from zephyr_ray.errors import Permanent
from zephyr_ray.recipe import Recipe
from zephyr_ray.recipe_file import read_yaml
from zephyr_ray.settings import Strict, typed

DEFAULT = Path("zephyr-cluster.yaml")
HEAD_MINIMUM_BYTES = 4 * 1024**3
"""The operator's advice: a head with less is killed for memory."""
QUEUED_GROUPS = 7
"""Kueue takes a RayJob of at most so many worker groups."""
RESERVED_VARIABLES = (
    r"HOME|HF_HOME|ZEPHYR_CACHE|PYTHONUNBUFFERED|MLFLOW_TRACKING_URI|RAY_.*|REDIS_.*"
)
"""Set by the job or the operator; a secret under such a name would break it."""
QUANTITY_UNITS = {
    **{"m": 1e-3, "": 1},
    **{prefix: 1000 ** (i + 1) for i, prefix in enumerate("kMGTPE")},
    **{f"{prefix}i": 1024 ** (i + 1) for i, prefix in enumerate("KMGTPE")},
}

DnsLabel = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


def _like(pattern: str, example: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"'{value}': write it like {example}")
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
# What the operator counts as GPUs of Ray: names that end in gpu, and NVIDIA's slices.
GpuKind = Annotated[
    str,
    _like(
        r"[a-z0-9.-]+/[a-z0-9.-]*gpu|nvidia\.com/mig-\d+g\.\d+gb",
        "nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-3g.40gb",
    ),
]


def _without_credentials(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError("must be http:// or https:// and a host, without user or password")
    _ = parts.port  # ValueError where it is none
    return address.rstrip("/")


class Toleration(Strict):
    """Kubernetes' own words, but for the case."""

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
    """GPUs of each replica."""
    image: str | None = Field(None, pattern=r"^[^\s]+$")
    """In place of the profile's, such as one with CUDA."""


class Storage(Strict):
    claim: DnsName
    """A PersistentVolumeClaim that every pod can mount at once."""
    folder: str = Field("/mnt/zephyr", pattern=r"^(/[A-Za-z0-9._-]+)+$")


class SecretKey(Strict):
    name: DnsName
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$")


class Profile(Strict):
    image: str = Field(pattern=r"^[^\s]+$")
    storage: Storage
    head: Group = Group(cpu="2", memory="8Gi")
    workers: dict[DnsLabel, Workers] = Field(min_length=1)
    context: str | None = None
    """Of the kubeconfig; its current one where this is left out."""
    namespace: DnsLabel | None = None
    image_pull_secrets: list[DnsName] = []
    mlflow: Annotated[str, AfterValidator(_without_credentials)] | None = None
    secrets: dict[str, SecretKey] = {}
    """Environment variables of the run, and where their values lie."""
    queue: DnsName | None = None
    active_deadline_seconds: int | None = Field(None, ge=1)
    backoff_limit: int = Field(2, ge=0)
    """How often a failed run starts anew on a fresh cluster; the store makes that cheap."""
    ttl_seconds: int = Field(600, ge=0)
    """How long the cluster of a finished run stays, to look at."""

    @property
    def cpus(self) -> float:
        """Of all workers together, as Ray counts: whole ones of each."""
        return sum(w.replicas * math.ceil(quantity(w.cpu)) for w in self.workers.values())

    @property
    def gpus(self) -> int:
        return sum(w.replicas * w.gpu.count for w in self.workers.values() if w.gpu)


def load(path: Path) -> Profile:
    """Reads and checks a profile. Everything wrong is one Permanent line."""
    profile = typed(Profile, read_yaml(path, "profile"), str(path))
    if quantity(profile.head.memory) < HEAD_MINIMUM_BYTES:
        raise Permanent(
            f"{path}: head.memory is {profile.head.memory}; the head needs at least 4Gi"
        )
    if profile.queue and len(profile.workers) > QUEUED_GROUPS:
        raise Permanent(
            f"{path}: {len(profile.workers)} worker groups; in a queue at most {QUEUED_GROUPS}"
        )
    for name in profile.secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise Permanent(f"{path}: secrets: '{name}' is no name of an environment variable")
        if re.fullmatch(RESERVED_VARIABLES, name):
            raise Permanent(f"{path}: secrets: {name} is set by the job itself; leave it out")
    return profile


def check_secrets(recipe: Recipe, profile: Profile, path: Path) -> None:
    """Every key the recipe's models need must come from a secret. Raises Permanent."""
    for name, spec in recipe.models.items():
        if spec.api_key_env and spec.api_key_env not in profile.secrets:
            raise Permanent(
                f"{path}: model '{name}' of the recipe reads {spec.api_key_env}; add under "
                f"secrets: {spec.api_key_env}: {{name: SECRET, key: KEY}}"
            )


def quantity(text: str) -> float:
    """Kubernetes' way to write amounts: 500m, 8, 64Gi."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", text).groups()  # type: ignore[union-attr]
    return float(number) * QUANTITY_UNITS[unit]
