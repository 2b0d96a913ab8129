"""Runs one engine at a time in a separate process, for successive passes over rows."""

import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from zephyr_ray.engines.settings import Engine, ModelSettings
from zephyr_ray.errors import Permanent

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger("zephyr_ray")

GRACE_SECONDS, END_SECONDS = 10, 60
"""Seconds to wait for an actor that Ray is killing before it is killed here, and before it is given
up: a process that a device driver holds in the kernel cannot be killed."""


class RowRunner(Protocol):
    """Runs the rows of one pass on an engine."""

    def __call__(self, batch: dict[str, Any]) -> Awaitable[Any]: ...

    def close(self) -> None:
        """Releases resources that would outlive the pass; keeps the engine."""


def identify(settings: ModelSettings, seed: int) -> str:
    """Returns a text that is equal for all settings that can share one engine."""
    return f"{settings.process_identity()} {seed}"


class EngineHost:
    """A process with one engine at a time, which the row runners of successive passes use."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._identity: str | None = None
        self._runner: RowRunner | None = None
        self._row_pass = ""

    async def run(self, row_pass: str, make: Callable[..., RowRunner], batch: Any) -> None:
        """Runs a block of rows of a pass. The first block of a pass, which may be empty, creates
        the runner and starts the engine."""
        if row_pass != self._row_pass:
            if self._runner:
                self._runner.close()
            self._runner = None  # it refers to the engine
            self._runner = make(start=self._start)
            self._row_pass = row_pass
        assert self._runner
        await self._runner(batch)

    def _start(self, settings: ModelSettings, seed: int) -> Engine:
        """Returns the running engine if it fits the settings, otherwise replaces it."""
        identity = identify(settings, seed)
        if self._engine is None or self._identity != identity:
            is_first, self._identity = self._identity is None, identity
            self._engine = None  # both engines may not fit into memory
            gc.unfreeze()  # vLLM freezes its initial objects
            gc.collect()
            try:
                self._engine = settings.start(seed)
            except Permanent:
                raise
            except Exception:
                if is_first:
                    raise
                log.exception("the engine did not start in a process that had run another")
                os._exit(1)  # Ray starts a new process, which may succeed
            # All rows would wait while the collector visits the objects of imported libraries.
            gc.collect()
            gc.freeze()
        return self._engine

    async def processes(self) -> tuple[str, list[tuple[int, float]]]:
        """Returns the node id, and the PID and creation time of the process and its children."""
        import psutil
        import ray

        this = psutil.Process()
        tree = [this, *this.children(recursive=True)]
        node = ray.get_runtime_context().get_node_id()
        return node, [(process.pid, process.create_time()) for process in tree]

    async def was_restarted(self) -> bool:
        """Returns whether the process died and was started again."""
        import ray

        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


class Dispatcher:
    """Passes blocks of rows from Ray Data to engine processes, each to the least busy one."""

    def __init__(self, hosts: list["ActorHandle"], row_pass: str, make: Any):
        """`make` is an object reference of the function that makes the runner."""
        self._hosts, self._row_pass, self._make = hosts, row_pass, make
        self._blocks = [0] * len(hosts)

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        index = self._blocks.index(min(self._blocks))
        self._blocks[index] += 1
        try:
            block = {"row": list(batch["row"])}
            await self._hosts[index].run.remote(self._row_pass, self._make, block)
        finally:
            self._blocks[index] -= 1
        return {"rows": [len(batch["row"])]}


def end_processes(tree: list[tuple[int, float]]) -> None:
    """Stops an actor that Ray is killing, with its children, and returns once all have exited, so
    that their memory is free, or after END_SECONDS. `tree` lists the PIDs and creation times of
    these processes on this machine, the actor first.

    The actor has GRACE_SECONDS to exit by itself: if it were killed before Ray does that, Ray would
    report a crash to the console.
    """
    start = time.monotonic()
    _kill(tree[1:])
    while any(map(_find, tree)) and (waited := time.monotonic() - start) < END_SECONDS:
        if waited > GRACE_SECONDS:
            _kill(tree)
        time.sleep(0.02)


def _kill(processes: list[tuple[int, float]]) -> None:
    import psutil

    for process in filter(None, map(_find, processes)):
        with suppress(psutil.NoSuchProcess):  # it exited just now
            process.kill()


def _find(process: tuple[int, float]) -> Any:
    """Returns the process with this PID and creation time; None if it exited."""
    import psutil

    pid, created = process
    with suppress(psutil.NoSuchProcess):
        current = psutil.Process(pid)
        if current.create_time() == created and current.status() != psutil.STATUS_ZOMBIE:
            return current
    return None
