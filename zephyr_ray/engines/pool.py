"""Keeps engines running from one stage to the next, and ends those that must make room.

A process without a GPU starts its next engine in place, because imports take most of the start. A
process on a GPU is replaced, because CUDA keeps memory after an engine is gone. An idle engine
holds memory and GPUs, but no CPU: stages run one after another, so Ray reserves none for it.
"""

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zephyr_ray.demand import RAY_BYTES
from zephyr_ray.engines.host import EngineHost, RowRunner, end_processes, identify
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.ray_cluster import cluster_address

if TYPE_CHECKING:
    from ray.actor import ActorHandle

ENGINE_DEATHS = 5
"""Maximum restarts per process before the stage fails."""
REPLY_SECONDS = 30
"""Maximum seconds to wait for a reply of an idle process."""


def process_for(settings: ModelSettings, seed: int) -> str:
    """Returns the name of the group of processes that can run the engine."""
    return identify(settings, seed) if settings.gpus_per_actor else settings.engine


def capacity(settings: ModelSettings) -> int:
    """Returns how many actors the cluster can run at once, at least one."""
    nodes, gpus = _nodes(), settings.gpus_per_actor
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    if not gpus:
        return max(1, cpus)
    return max(1, min(cpus, sum(_places(node.get("GPU", 0), gpus) for node in nodes)))


def _places(node_gpus: float, gpus: float) -> int:
    """Returns how many actors fit on a node: the GPUs of an actor are on one node, and a fraction
    is part of a single GPU."""
    return int(node_gpus // gpus) if gpus >= 1 else int(node_gpus) * int(1 / gpus)


def _nodes() -> list[dict[str, float]]:
    """Returns the resources of each node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class EnginePool:
    """The engine processes of a run. They end with the run, however it ends, because Ray ends the
    actors of a driver that has exited."""

    def __init__(self) -> None:
        self._hosts: dict[str, list[ActorHandle]] = {}
        """Processes by the name of their group."""
        self._engines: dict[str, tuple[str, float]] = {}
        """Identity of the engine in the processes of each group, and the GPUs that they hold."""
        self._upcoming: list[str] = []

    def open_pass(
        self, settings: ModelSettings, seed: int, count: int, make: Callable[..., RowRunner]
    ) -> dict[str, Any]:
        """Returns the arguments of the `Dispatcher` of one pass over rows. Its processes start the
        engine now unless it is already running; `make(start=…)` makes the runner in each."""
        import ray

        row_pass, maker = uuid.uuid4().hex, ray.put(make)
        hosts = self._take(settings, seed, count)
        for host in hosts:
            host.run.remote(row_pass, maker, {"row": []})
        return {"hosts": hosts, "row_pass": row_pass, "make": maker}

    def _take(self, settings: ModelSettings, seed: int, count: int) -> list["ActorHandle"]:
        """Returns processes that run the engine or can start it."""
        name, gpus = process_for(settings, seed), settings.gpus_per_actor
        if gpus:
            self._free_gpus(name, gpus, count)
        hosts = self._hosts.pop(name, [])
        sound = [host for host in hosts if _is_sound(host)][:count]
        _end([host for host in hosts if host not in sound])
        self._hosts[name] = [*sound, *(_new_host(gpus) for _ in range(count - len(sound)))]
        self._engines[name] = identify(settings, seed), gpus * count
        return list(self._hosts[name])

    def prepare(
        self,
        asks: Sequence[tuple[ModelSettings, int]],
        upcoming: Sequence[str],
        memory: float,
        trains: bool,
    ) -> None:
        """Stops engines before a stage: those that neither it nor a later stage uses, and those
        that leave it too little room, starting with the one that is needed last.

        `asks` are the models and seeds of the stage, `upcoming` the identities of the engines of
        this stage and the later ones in their order, `memory` the bytes that the stage needs, and
        `trains` whether it runs workers, which take all GPUs and CPUs that they can get.
        """
        self._upcoming = list(upcoming)
        used = {process_for(*ask) for ask in asks}
        for name in self._idle(used):
            identity, gpus = self._engines[name]
            if identity not in self._upcoming or not _fits(memory, trains, gpus):
                self._remove(name)

    def close(self) -> None:
        """Stops all processes."""
        for name in list(self._hosts):
            self._remove(name)

    def _idle(self, used: set[str]) -> list[str]:
        """Returns the processes that are not in use, starting with those that are needed last."""

        def next_use(name: str) -> int:
            identity, _ = self._engines[name]
            later = self._upcoming
            return later.index(identity) if identity in later else len(later)

        return sorted(self._hosts.keys() - used, key=next_use, reverse=True)

    def _free_gpus(self, name: str, gpus: float, count: int) -> None:
        """Stops idle processes until `count` actors with `gpus` GPUs each fit beside the
        others; otherwise Ray would wait forever."""
        per_node = [total for node in _nodes() if (total := node.get("GPU", 0))]
        # Idle processes may leave some GPUs on each node, but not enough on any.
        needs_node = gpus > 1 and len(per_node) > 1
        for idle in self._idle({name}):
            held = sum(g for other, (_, g) in self._engines.items() if other != name)
            if self._engines[idle][1] and (needs_node or held + gpus * count > sum(per_node)):
                self._remove(idle)

    def _remove(self, name: str) -> None:
        del self._engines[name]
        _end(self._hosts.pop(name))


def _fits(memory: float, trains: bool, gpus: float) -> bool:
    """Returns whether an idle engine can keep running during a stage. The memory of the other
    machines of a cluster is not known."""
    import psutil

    if trains and (gpus or cluster_address()):
        return False
    if cluster_address():
        return True
    return memory + RAY_BYTES <= psutil.virtual_memory().available


def _new_host(gpus: float) -> "ActorHandle":
    import ray

    # Without num_cpus, Ray places an actor on a node with a free CPU but reserves none.
    resources = {"num_cpus": 0, "num_gpus": gpus} if gpus else {}
    host = ray.remote(EngineHost).options(
        max_restarts=ENGINE_DEATHS,
        # Ray detects a lost node late; retries before that must not count.
        max_task_retries=-1,
        scheduling_strategy="SPREAD",
        **resources,
    )
    return host.remote()


def _is_sound(host: "ActorHandle") -> bool:
    """Returns whether a process is alive and was never restarted, so that it has all its restarts
    left."""
    import ray

    try:
        reply = host.was_restarted.options(max_task_retries=0).remote()
        return not ray.get(reply, timeout=REPLY_SECONDS)
    except ray.exceptions.RayError:
        return False


def _end(hosts: list["ActorHandle"]) -> None:
    """Kills processes, and returns once they and their children have exited."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    replies = [host.processes.options(max_task_retries=0).remote() for host in hosts]
    ends = []
    for host, reply in zip(hosts, replies, strict=True):
        tree = None
        with suppress(ray.exceptions.RayError):  # it may be dead or restarting
            node, tree = ray.get(reply, timeout=REPLY_SECONDS)
        ray.kill(host)
        if tree:
            end = ray.remote(end_processes).options(
                num_cpus=0, scheduling_strategy=On(node, soft=True)
            )
            ends.append(end.remote(tree))
    with suppress(ray.exceptions.RayError):  # the node may be lost
        ray.get(ends)
