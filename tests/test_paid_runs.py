"""Tests paid runs on real Ray actors: a kill -9 of the driver, and a budget that runs out midway.

The endpoint's own count of tokens decides what was paid.
"""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from fake_endpoint import Answer, Endpoint, completion, endpoint
from mlflow import MlflowClient
from ray import cloudpickle
from ray._private.state import actors, jobs

from zephyr_ray import pipeline, spending
from zephyr_ray.engines.governor import Governor
from zephyr_ray.engines.ledger import Ledger
from zephyr_ray.engines.meter import Meter
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.formatting import dollars, number
from zephyr_ray.messages import user
from zephyr_ray.models.contract import StopRun
from zephyr_ray.spending import CALLS_AT_ONCE
from zephyr_ray.store import Journal

pytestmark = pytest.mark.usefixtures("ray_cluster")
# Actors cannot import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PRICE = (2.0, 10.0)
ROWS, CALLS = 24, 3
"""Dialogues, and calls per dialogue of two turns: an answer, a question and an answer."""
KILL_AT = 31
"""Answers before the kill; not a multiple of CALLS, so a dialogue has only its first ones."""
RECIPE = """
name: paid
budget_usd: 1000
models:
  teacher:
    {{engine: openai, model: m, base_url: "{url}", price: {price}, actors: 2, concurrency: 4}}
stages:
  prompts: {{kind: prompts, seeds: seeds.jsonl, constrained: 0}}
  dialogues: {{kind: self_refine, model: teacher, prompts: prompts, turns: 2, max_tokens: 24}}
"""


class Bill:
    """The endpoint's own count of dollars and requests. Its answers are unique."""

    def __init__(self) -> None:
        self.dollars = 0.0
        self.served: list[str] = []
        """Questions by the number in their answer."""
        self.gate = threading.Event()
        """Holds back requests after the first KILL_AT until it is set."""
        self.gate.set()
        self._lock = threading.Lock()

    def reply(self, number: int, body: dict[str, Any]) -> Answer:
        if number >= KILL_AT:
            self.gate.wait()
        time.sleep(0.05)
        given = sum(len(m["content"]) for m in body["messages"]) // 4
        usage = {"prompt_tokens": given, "completion_tokens": 1 + number % body["max_tokens"]}
        with self._lock:
            self.served.append(json.dumps(body["messages"]))
            text = f"answer {len(self.served) - 1}"
            used = usage["prompt_tokens"] * PRICE[0] + usage["completion_tokens"] * PRICE[1]
            self.dollars += used / 1e6
        return Answer(200, completion(text) | {"usage": usage})


def run(folder: Path, **settings: Any) -> int:
    overrides = [f"storage={folder / 'runs'}", *(f"{k}={v}" for k, v in settings.items())]
    return pipeline.main([str(folder / "paid.yaml"), *(o for v in overrides for o in ("--set", v))])


def entries(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """Yields the entries of journals, without those that the kill cut short."""
    for journal in (folder / "runs").glob(pattern):
        yield from Journal(journal).read_new()


def kept_answers(folder: Path) -> set[str]:
    return {entry["text"] for entry in entries(folder, "answers/*")}


def kill_midway(folder: Path, server: Endpoint) -> None:
    """Runs the recipe in its own driver, and kills it with KILL_AT answers kept and others under
    way; returns once its actors have ended."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "zephyr_ray.pipeline", str(folder / "paid.yaml")]
    driver = subprocess.Popen(
        [*command, "--set", f"storage={folder / 'runs'}"],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while len(kept_answers(folder)) < KILL_AT or len(server.bodies) == KILL_AT:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    [job] = [job["JobID"] for job in jobs() if job["DriverPid"] == driver.pid]
    while any(
        actor["State"] != "DEAD" or psutil.pid_exists(actor["Pid"])
        for actor in actors().values()
        if actor["JobID"] == job and not actor["IsDetached"]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_run_pays_for_no_answer_twice_and_keeps_to_its_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise the last figures of a run may be missing in MLflow.
    monkeypatch.setattr(spending, "REPLY_SECONDS", 300)
    tasks = ({"instruction": f"Name a thing that begins with {n}."} for n in range(ROWS))
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    bill = Bill()
    bill.gate.clear()
    with endpoint(bill.reply) as server:
        recipe = RECIPE.format(url=server.url, price=list(PRICE))
        (tmp_path / "paid.yaml").write_text(recipe)
        kill_midway(tmp_path, server)
        kept = kept_answers(tmp_path)
        bill.gate.set()
        deadline = time.monotonic() + 300
        while len(bill.served) < len(server.bodies):
            assert time.monotonic() < deadline, "a request is not answered"
            time.sleep(0.01)
        finished = sum("row" in entry for entry in entries(tmp_path, "store/*/scratch/rows"))
        assert len(kept) > CALLS * finished  # some rows have only their first answers
        killed = len(bill.served)
        ledger = tmp_path / "runs" / "spending" / "paid"

        budget = Ledger(ledger).max_dollars + 0.003
        assert run(tmp_path, budget_usd=budget) == 2
        assert "raise budget_usd, then run again" in capsys.readouterr().err
        assert bill.dollars <= budget
        assert killed < len(bill.served) and len(set(bill.served)) < CALLS * ROWS

        assert run(tmp_path, budget_usd=1000) == 0
    # Only the requests in flight at the kill were sent again.
    times = Counter(bill.served)
    twice = [n for n, asked in enumerate(bill.served) if times[asked] > 1 and n < killed]
    assert not kept & {f"answer {n}" for n in twice}
    assert len(bill.served) == CALLS * ROWS + len(twice)

    [spent] = Ledger(ledger).spent().values()
    assert spent.requests + spent.repeated_requests >= len(bill.served) >= spent.requests
    assert spent.dollars <= bill.dollars <= spent.max_dollars
    assert 0 < len(twice) <= 8  # two actors with 4 requests in flight each
    # Requests with a reply count, too, until their cost is settled: 6 rows in flight per actor.
    assert len(twice) <= spent.repeated_requests <= 12
    [manifest] = (tmp_path / "runs" / "store").glob("self_refine-*/manifest.json")
    counts = json.loads(manifest.read_text())["counts"]
    counted = {name: counts[f"paid/teacher/{name}"] for name in vars(spent)}
    assert counted == pytest.approx(vars(spent), rel=1e-9)  # the order of summation may differ
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paid").experiment_id
    [tracked] = client.search_runs([experiment], "tags.`zephyr.stage` = 'dialogues'")
    shown = [tracked.data.metrics[name] for name in ("spent_usd", "stage_usd", "projected_usd")]
    assert shown == pytest.approx([spent.max_dollars] * 3)


def test_a_report_states_what_was_paid_before_a_setting_changed(tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a thing."}\n')
    with endpoint(Bill().reply) as server:
        recipe = RECIPE.format(url=server.url, price=[2e4, 1e5])
        (tmp_path / "paid.yaml").write_text(f"{recipe}  page: {{kind: report, of: [dialogues]}}\n")
        assert run(tmp_path) == 0
        assert run(tmp_path, **{"dialogues.max_tokens": 25}) == 0
    [spent] = Ledger(tmp_path / "runs" / "spending" / "paid").spent().values()
    html = (tmp_path / "runs" / "paid" / "report.html").read_text()
    assert spent.requests == 2 * CALLS
    assert f"<dt>Cost</dt><dd>{dollars(spent.max_dollars)}</dd>" in html
    assert f"{number(spent.dollars, 4)}</td>" in html and "other stages" in html


@ray.remote(num_cpus=0)
class Actor:
    """Asks several questions at once, until the budget is spent."""

    async def ask(self, url: str, meter: Meter, number: int) -> int:
        settings = OpenAISettings(model="m", base_url=url)
        engine = settings.start(seed=0)

        async def questions(row: str) -> int:
            ask = engine.ask_for(Model("m", settings, meter=meter), {"id": row})
            for count in itertools.count():
                try:
                    await ask([user(f"Hello {row}, {count}")], max_tokens=24)
                except StopRun:
                    return count
            raise AssertionError

        return sum(await asyncio.gather(*(questions(f"{number}/{n}") for n in range(4))))


def test_sixteen_actors_keep_to_a_budget_and_fill_it(tmp_path: Path) -> None:
    budget, bill = 0.1, Bill()
    tariff = OpenAISettings(model="m", base_url="http://a/v1", price=PRICE).tariff()
    assert tariff
    governor = ray.remote(Governor).options(num_cpus=0, max_concurrency=CALLS_AT_ONCE)
    running = governor.remote(tmp_path, "run", {"m": tariff}, budget)
    with endpoint(bill.reply) as server:
        meter = Meter(running, "s", "m")
        actors = [Actor.remote() for _ in range(16)]
        asked = ray.get([a.ask.remote(server.url, meter, n) for n, a in enumerate(actors)])
    [spent] = ray.get(running.spent.remote()).values()
    assert 0.98 * budget < bill.dollars <= budget
    assert sum(asked) == len(bill.served) == spent.requests
    assert spent.max_dollars == pytest.approx(bill.dollars)
