"""Classifies failures of training workers: lack of memory, a dead process, or an exception."""

from collections.abc import Iterator
from pathlib import Path

from zephyr_ray.ray_cluster import blames_memory


def kernel_kills() -> int:
    """Returns how many processes the kernel has killed on this machine for lack of memory."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counters.get("oom_kill", 0))


def ran_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error of `trainer.fit` says that memory was short."""
    return any(isinstance(cause, MemoryError) or blames_memory(cause) for cause in _causes(error))


def died(error: BaseException) -> bool:
    """Returns whether a worker process died, perhaps killed by the kernel."""
    from ray.exceptions import RayActorError

    return any(isinstance(cause, RayActorError) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the causes of an error of `trainer.fit`: one per failed worker, or the controller's;
    the error itself if it names none."""
    parts = [
        *getattr(error, "worker_failures", {}).values(),
        *(getattr(error, name, None) for name in ("health_check_failure", "controller_failure")),
    ]
    if not any(parts):
        yield error
    for part in filter(None, parts):
        yield from _causes(part)
