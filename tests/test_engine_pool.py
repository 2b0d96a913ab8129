"""Tests which engines stay up between stages, which are ended, and that their processes exit."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import cloudpickle

from zephyr_ray import recipe as recipes
from zephyr_ray.engines import host, pool
from zephyr_ray.engines.host import EngineHost, identify
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.pool import EnginePool
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.execution import Execution
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import Step
from zephyr_ray.rows import run_rows
from zephyr_ray.spending import Spending
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, Store

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test module

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PLENTY = 2**50
"""Bytes of memory that are enough for any stage."""


# --- real processes ------------------------------------------------------------------------------


async def where(row: dict[str, Any], judge: Any) -> dict[str, Any]:
    """Returns the row with its process and engine; starts a child process on demand."""
    child = subprocess.Popen(["sleep", "600"]).pid if row.get("child") else None
    return row | {"pid": os.getpid(), "engine": judge._relevance_min, "child": child}


def is_gone(pid: int) -> bool:
    """Returns whether a process exited; a zombie holds no memory."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run_pass(folder: Path, engines: EnginePool, engine: float, **row: Any) -> dict[str, Any]:
    """Runs one row as its own stage, on the engine with this `relevance_min`."""
    folder = folder / str(len(list(folder.iterdir())))
    work = Work("stage", folder, 0, {}, {}, {}, engines=engines)
    model = Model("rules", RulesSettings(relevance_min=engine))
    [result] = run_rows(work, [{"id": "a", **row}], where, [model])
    return result


def test_processes_serve_stage_after_stage_until_they_are_ended(
    tmp_path: Path, ray_cluster: None
) -> None:
    engines = EnginePool()
    first = run_pass(tmp_path, engines, 0.1)
    second = run_pass(tmp_path, engines, 0.2)
    assert (first["engine"], second["engine"]) == (0.1, 0.2)
    assert first["pid"] == second["pid"]
    os.kill(first["pid"], signal.SIGKILL)
    third = run_pass(tmp_path, engines, 0.2, child=True)
    assert third["pid"] != first["pid"]
    engines.close()
    assert is_gone(third["pid"]) and is_gone(third["child"])


DRIVER = """
import os, signal, sys
import ray
from zephyr_ray.engines.pool import EnginePool
from zephyr_ray.engines.rules import RulesSettings

ray.init(address=sys.argv[1], log_to_driver=False)
[engine] = EnginePool()._take(RulesSettings(), 0, 1)
_, [(pid, _), *_] = ray.get(engine.processes.remote())
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_driver_leaves_no_engine(ray_cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 180
    while not is_gone(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- which engines are ended, without processes --------------------------------------------------


class Processes:
    """Stands in for processes: counts those that were made, and notes those that were ended."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, available: int = PLENTY, gpus: Sequence[int] = ()
    ):
        """`gpus` is the number of GPUs of each node."""
        self.made = 0
        self.ended: list[Any] = []
        memory = namedtuple("memory", "available")
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(available))
        monkeypatch.setattr(pool, "_new_host", self._make)
        monkeypatch.setattr(pool, "_is_sound", lambda host: True)
        monkeypatch.setattr(pool, "_end", self.ended.extend)
        nodes = [{"Alive": True, "Resources": {"CPU": 16, "GPU": count}} for count in gpus]
        monkeypatch.setattr("ray.nodes", lambda: nodes)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def _make(self, gpus: float) -> int:
        self.made += 1
        return self.made


A, B = (VllmSettings(weights=name) for name in "ab")
GPU_A, GPU_B, GPU_C = (VllmSettings(weights=name, gpus=1) for name in "abc")
JUDGE = RulesSettings()


def prepare(engines: EnginePool, asks: list[Any], later: list[Any], **stage: Any) -> None:
    """Prepares a stage that asks some models, before later stages that ask others."""
    upcoming = [identify(settings, 0) for settings in asks + later]
    asked = [(settings, 0) for settings in asks]
    engines.prepare(asked, upcoming, **{"memory": 0, "trains": not asks} | stage)


def test_an_engine_stays_through_training_if_it_is_needed_and_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes, engines = Processes(monkeypatch, available=8 * 10**9), EnginePool()
    first = engines._take(A, 0, 2)
    prepare(engines, [], [A], memory=6e9)
    assert engines._take(A, 0, 2) == first and not processes.ended
    prepare(engines, [], [A], memory=7e9)
    assert processes.ended == first


def test_an_engine_that_no_stage_needs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, engines = Processes(monkeypatch), EnginePool()
    a = engines._take(A, 0, 2)
    prepare(engines, [], [B])
    assert processes.ended == a


def test_the_process_of_an_engine_takes_the_next_one_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes, engines = Processes(monkeypatch), EnginePool()
    a = engines._take(A, 0, 2)
    prepare(engines, [B], [])
    assert engines._take(B, 0, 2) == a
    judge = engines._take(JUDGE, 0, 1)
    assert processes.made == 3 and not processes.ended
    prepare(engines, [JUDGE], [A])  # the process no longer holds engine A
    assert processes.ended == a
    assert engines._take(JUDGE, 0, 1) == judge


def test_the_idle_engine_that_is_needed_last_is_ended_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes, engines = Processes(monkeypatch, gpus=[3]), EnginePool()
    a, b = engines._take(GPU_A, 0, 1), engines._take(GPU_B, 0, 1)
    prepare(engines, [GPU_C], [GPU_B, GPU_A])
    engines._take(GPU_C, 0, 1)
    assert not processes.ended
    prepare(engines, [JUDGE], [GPU_B, GPU_A])
    engines._take(GPU_C, 0, 2)
    assert processes.ended == [3, *a]
    assert engines._take(GPU_B, 0, 1) == b


def test_an_engine_gets_its_gpus_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle engines may hold one GPU of each node."""
    processes, engines = Processes(monkeypatch, gpus=[2, 2]), EnginePool()
    a = engines._take(GPU_A, 0, 2)
    large = VllmSettings(weights="d", gpus=2)
    prepare(engines, [large], [GPU_A])
    engines._take(large, 0, 1)
    assert processes.ended == a


@pytest.mark.parametrize(
    ("gpus", "nodes", "places"),
    [(0, [0, 0], 32), (1, [2, 3], 5), (2, [3, 3], 2), (3, [8, 8], 4), (0.5, [1, 1], 4)]
    + [(0.6, [2], 2), (0.1, [1], 10), (8, [4, 4], 1)],
)
def test_as_many_actors_start_as_fit_on_the_nodes(
    gpus: float, nodes: list[int], places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Processes(monkeypatch, gpus=nodes)
    assert pool.capacity(VllmSettings(weights="a", gpus=gpus)) == places


def test_a_process_that_exits_by_itself_does_not_keep_others_from_being_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    known = psutil.Process(gone.pid)
    gone.wait()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    first = iter([known])  # the first lookup is just before it exits
    find = host._find
    monkeypatch.setattr(host, "_find", lambda p: next(first, None) if p[0] == gone.pid else find(p))
    tree = [(gone.pid, 0.0), (gone.pid, 0.0)]  # an actor, and a child
    host.end_processes([*tree, (child.pid, psutil.Process(child.pid).create_time())])
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize(("seconds", "grace", "code"), [(1, 30, 7), (600, 0.1, -signal.SIGKILL)])
def test_an_actor_is_killed_only_if_ray_does_not_end_it(
    seconds: int, grace: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray reports a crash if an actor is killed by anything else."""
    monkeypatch.setattr(host, "GRACE_SECONDS", grace)
    program = f"import time; time.sleep({seconds}); exit(7)"
    actor = subprocess.Popen([sys.executable, "-c", program])
    host.end_processes([(actor.pid, psutil.Process(actor.pid).create_time())])
    assert actor.poll() == code


def test_training_gets_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, engines = Processes(monkeypatch, gpus=[8]), EnginePool()
    a = engines._take(GPU_A, 0, 1)
    prepare(engines, [JUDGE], [GPU_A])
    assert not processes.ended
    prepare(engines, [], [GPU_A])
    assert processes.ended == a


def test_training_on_a_cluster_gets_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free memory of other machines is not known."""
    processes, engines = Processes(monkeypatch), EnginePool()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    a = engines._take(A, 0, 1)
    prepare(engines, [JUDGE], [A], memory=2 * PLENTY)
    assert not processes.ended
    prepare(engines, [], [A])
    assert processes.ended == a


def test_the_quickstart_imports_vllm_once_per_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load(CONFIGS / "quickstart.yaml", KINDS, [f"storage={tmp_path}"])
    steps = [Step(name, stage, {}, name, None) for name, stage in recipe.stages.items()]
    spending = Spending(recipe, tmp_path, steps)
    execution = Execution(recipe, Store(tmp_path), steps, spending)
    processes = Processes(monkeypatch)
    running: dict[int, str] = {}
    starts: list[str] = []
    for step in steps:
        artifacts = {s.name: s.artifact for s in steps if s.artifact}
        execution._make_room(step, artifacts)
        for settings, seed in execution._models_queried(step.stage, artifacts):
            taken = execution.engines._take(settings, seed, settings.actors)
            assert len(taken) == 2
            if running.get(taken[0]) != identify(settings, seed):
                starts.append(
                    Path(getattr(settings, "weights", "judge/model")).parent.name or "base"
                )
            running |= dict.fromkeys(taken, identify(settings, seed))
        step.artifact = Artifact(tmp_path / step.name, Manifest(kind="", key="", files={}))
    assert starts == ["base", "judge", "sft", "base", "sft", "dpo"]
    assert processes.made == 4


# --- one process ---------------------------------------------------------------------------------


class Fails(RulesSettings):
    def start(self, seed: int) -> Any:
        raise Permanent("no") if self.relevance_min else RuntimeError("out of memory")


def test_the_garbage_collector_skips_imported_libraries_while_rows_run() -> None:
    gc.unfreeze()
    EngineHost()._start(JUDGE, 0)
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert frozen > 10_000


def test_an_engine_that_does_not_start_in_the_place_of_another_gets_a_new_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(host.os, "_exit", end)
    broken = Fails(relevance_min=0)
    with pytest.raises(RuntimeError):
        EngineHost()._start(broken, 0)
    used = EngineHost()
    used._start(JUDGE, 0)
    with pytest.raises(SystemExit):
        used._start(broken, 0)
    with pytest.raises(Permanent):
        used._start(Fails(relevance_min=1), 0)
