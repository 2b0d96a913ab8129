"""Kills one of two replicas under a steady load, then redeploys. Takes minutes, so it runs only
with `make test-rollout`.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import KEY, a_run, free_port

pytestmark = [pytest.mark.rollout, pytest.mark.timeout(1500)]

CLIENTS = 4


class Load:
    """Sends requests from several clients without a pause and without retries."""

    def __init__(self, url: str):
        self.url, self.done, self.failed = url, 0, list[str]()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self) -> None:
        body = {
            "model": "dpo",
            "messages": [{"role": "user", "content": "def"}],
            "max_tokens": 48,
        }
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(timeout=120, headers=headers) as client:
            while not self._stop.is_set():
                try:
                    reply = client.post(self.url, json=body)
                    if reply.status_code != 200 or not reply.json()["usage"]:
                        self.failed.append(f"{reply.status_code}: {reply.text[:200]}")
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                self.done += 1

    def run_for(self, requests: int) -> None:
        wanted, deadline = self.done + requests, time.monotonic() + 300
        while self.done < wanted:
            assert time.monotonic() < deadline, self.failed[:3]
            time.sleep(0.2)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import ray
    from ray import serve

    monkeypatch.setenv("ZEPHYR_API_KEYS", KEY)
    port = free_port()
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas() -> list[str]:
    from ray.util import list_named_actors

    actors = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if "#model-dpo#" in actor["name"]]


def test_a_killed_replica_and_a_redeploy_lose_no_request(
    address: str, tiny_model: Path, tmp_path: Path
) -> None:
    import ray
    from ray import serve

    from zephyr_ray.serve.app import ServeSettings, build

    settings = {"run": a_run(tmp_path, tiny_model), "models": ["dpo"], "context": 256}
    two = ServeSettings.model_validate({**settings, "replicas": 2, "requests_per_minute": 10**6})
    serve.run(build(two), name="zephyr", route_prefix="/")
    before = replicas()
    assert len(before) == 2
    with Load(f"{address}/v1/chat/completions") as load:
        load.run_for(20)
        ray.kill(ray.get_actor(before[0], namespace="serve"))
        load.run_for(40)
        serve.run(build(two.model_copy(update={"context": 200})), name="zephyr", route_prefix="/")
        load.run_for(20)
    assert not set(before) & set(replicas())
    assert load.failed == []
    assert load.done >= 80
    for name in replicas():
        ray.kill(ray.get_actor(name, namespace="serve"))
    wait_for_health(address, 503)
    wait_for_health(address, 200)


def wait_for_health(address: str, status: int) -> None:
    deadline = time.monotonic() + 180
    while (seen := httpx.get(f"{address}/health", timeout=30).status_code) != status:
        assert time.monotonic() < deadline, seen
        time.sleep(0.5)
