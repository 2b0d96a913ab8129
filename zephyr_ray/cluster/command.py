"""Runs `zephyr submit`, `status`, `logs` and `stop`."""

import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from zephyr_ray.cluster import bundle, profile
from zephyr_ray.cluster.job import job_name, ray_job
from zephyr_ray.cluster.kube import Kube, Missing
from zephyr_ray.cluster.logs import (
    LogFollower,
    last_lines,
    log_lines,
    submitters,
)
from zephyr_ray.cluster.screen import live_table, show
from zephyr_ray.cluster.watch import (
    EXIT_STOPPED,
    JOBS,
    State,
    start_problems,
    states,
)
from zephyr_ray.display import Row, read_line, stage_table
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.formatting import rounded
from zephyr_ray.masking import masked
from zephyr_ray.recipe import Recipe

CLEAN_UP_PAUSES = (1.0, 4.0, 16.0)
"""Seconds between attempts to delete a job that was created only in part."""


def connect_kube(path: Path) -> Kube:
    """Connects to the profile's cluster, or the kubeconfig's if the default profile is missing."""
    if path == profile.DEFAULT and not path.exists():
        return Kube()
    loaded = profile.load(path)
    return Kube(loaded.context, loaded.namespace)


def submit(
    path: Path,
    raw: dict[str, Any],
    recipe: Recipe,
    loaded: profile.Profile,
    wait: bool,
    logs: bool,
) -> int:
    """Creates the job from `raw`, which is `recipe` as read. Returns the job's exit code if `wait`
    or `logs` is set, else 0."""
    files = bundle.bundle(raw, recipe, loaded.storage.folder, path)
    kube = Kube(loaded.context, loaded.namespace)
    name = job_name(recipe.name)
    create(kube, ray_job(name, loaded), files)
    print(f"job       {name} in {kube.namespace}")
    print(f"follow    zephyr logs {name} --follow")
    print(f"stop      zephyr stop {name}", flush=True)
    return follow(kube, name, logs) if wait or logs else 0


def show_objects(path: Path, raw: dict[str, Any], recipe: Recipe, loaded: profile.Profile) -> int:
    """Prints as YAML what `submit` would create; sends no request. The ConfigMap lacks its owner,
    because the API server chooses the owner's uid."""
    name = job_name(recipe.name)
    files = bundle.bundle(raw, recipe, loaded.storage.folder, path)
    objects = [ray_job(name, loaded), bundle.config_map(name, files)]
    for one in objects if loaded.namespace else ():
        one["metadata"]["namespace"] = loaded.namespace
    print(yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True), end="")
    return 0


class _Dumper(yaml.SafeDumper):
    """Writes YAML as a person would: no aliases, and texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def create(kube: Kube, job: dict[str, Any], files: dict[str, bytes]) -> None:
    """Creates the job, then the ConfigMap that it owns and mounts; its pods wait for that. Deletes
    the job if a step fails, and with it the ConfigMap."""
    name, owner = job["metadata"]["name"], None
    try:
        owner = kube.create(kube.path(JOBS), job)
        kube.create(kube.path("configmaps"), bundle.config_map(name, files, owner))
    except BaseException as error:
        # A rejected job was not created, and one of that name may belong to someone else. After a
        # timeout or Ctrl-C the job may exist.
        if owner or not isinstance(error, Permanent):
            _try_delete(kube, kube.path(JOBS, name))
        raise


def _try_delete(kube: Kube, path: str) -> None:
    # The same outage may hit this request too, and a job that stays keeps its GPUs.
    for pause in (*CLEAN_UP_PAUSES, None):
        try:
            return kube.delete(path)
        except Missing:
            return
        except (Permanent, Temporary) as error:
            if pause is None or isinstance(error, Permanent):
                print(f"could not delete {path} ({error}); delete it if it exists", file=sys.stderr)
                return
            time.sleep(pause)


def follow(kube: Kube, name: str, logs: bool) -> int:
    """Waits for a job to end and returns its exit code. Ctrl-C asks whether to leave it running."""
    try:
        with live_table() as show_line:
            return _follow(kube, name, show_line if logs else None)
    except KeyboardInterrupt:
        return _interrupted(kube, name)


def _follow(kube: Kube, name: str, show_line: Callable[[str], None] | None) -> int:
    follower = LogFollower(kube, name, show_line, _say) if show_line else None
    ended = False
    try:
        if follower:
            follower.start()
        reported: set[str] = set()
        last_state = ""
        for state in states(kube, name, _say):
            if str(state) != last_state:
                _say(last_state := str(state))
            if state.job != "RUNNING" and not state.ended:
                fresh = [line for line in start_problems(kube, state) if line not in reported]
                reported.update(fresh)
                for line in fresh:
                    _say(line)
        ended = True
        return state.exit_code
    finally:
        if follower:
            follower.finish(ended)


def _interrupted(kube: Kube, name: str) -> int:
    try:
        answer = input(f"\nleave {name} running? [Y/n] ") if sys.stdin.isatty() else ""
    except (EOFError, KeyboardInterrupt):
        answer = ""
    if answer.strip().lower() in ("n", "no"):
        stop(kube, name)
    else:
        print(
            f"\n{name} keeps running; zephyr logs {name} --follow shows it again", file=sys.stderr
        )
    return EXIT_STOPPED


def stop(kube: Kube, name: str) -> int:
    """Deletes the job; KubeRay then ends the run and deletes its Ray cluster."""
    _existing_job(kube, name)
    kube.delete(kube.path(JOBS, name))
    print(f"{name} is stopped and its finished work is kept; submit the recipe again to continue")
    return 0


def status(kube: Kube, name: str | None) -> int:
    """Prints a table of all jobs in the namespace, or the state and stages of one job."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    if name is None:
        states_of_all = [State.of(job) for job in kube.items(kube.path(JOBS))]
        if not states_of_all:
            print(f"no jobs in {kube.namespace}")
            return 0
        columns = [Column(heading, overflow="fold") for heading in ("job", "age", "state")]
        table = Table(*columns, box=None, pad_edge=False)
        for state in sorted(states_of_all, key=lambda s: s.created):
            table.add_row(state.name, _age(state.created), Text(masked(state)))
        Console().print(table)
        return 0
    state = State.of(_existing_job(kube, name))
    print(f"job       {name} in {kube.namespace}, {_age(state.created)} old")
    print(f"state     {masked(state)}")
    if not state.ended and state.job != "RUNNING":
        for line in start_problems(kube, state):
            print(f"trouble   {masked(line)}")
    rows: dict[str, Row] = {}
    for line in last_lines(kube, name):
        read_line(rows, masked(line))
    if rows:
        Console().print(stage_table(rows))
    return 0


def logs(kube: Kube, name: str, follow_to_end: bool) -> int:
    """Prints a job's log so far and returns 0; or follows it and returns the job's exit code."""
    state = State.of(_existing_job(kube, name))
    if follow_to_end:
        return follow(kube, name, logs=True)
    pods = submitters(kube, name)
    if not pods:
        raise Permanent(f"{name} has no log: {state}")
    for line in log_lines(kube, pods[-1]["metadata"]["name"]):
        show(line)
    return 0


def _existing_job(kube: Kube, name: str) -> dict[str, Any]:
    try:
        if not re.fullmatch(r"[a-z0-9.-]+", name):
            raise Missing(name)
        return kube.get(kube.path(JOBS, name))
    except Missing:
        raise Permanent(
            f"no job {name} in {kube.namespace}; list the jobs with zephyr status"
        ) from None


def _age(created: str) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    except (ValueError, TypeError):
        return "?"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{rounded(seconds / size, 0)} {unit}"
    return f"{rounded(seconds, 0)} s"


def _say(line: str) -> None:
    """Prints a line about the job to standard error, apart from its log."""
    print(f"{datetime.now():%H:%M:%S} ▸ {masked(line)}", file=sys.stderr, flush=True)
