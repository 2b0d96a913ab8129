"""Compares `zephyr serve` with `vllm serve`: time to first token, and tokens per second.

    .venv/bin/python benchmarks/serve.py runs/quickstart

Both serve the run's newest model on this machine with the same engine settings. They are measured
in alternation, so that a slow minute affects both. Answers are greedy, of 64 tokens.
"""

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai

from zephyr_ray.engines.vllm import CPU_ENVIRONMENT, KV_CACHE_BYTES
from zephyr_ray.run_folder import models_of

CLIENTS = (1, 8, 32)
ANSWERS = {1: 4, 8: 24, 32: 64}
"""Answers per round, by number of clients."""
ROUNDS = 4
TOKENS = 64
CONTEXT = 1024
SUBJECTS = ("rain", "bread", "bridges", "violins", "maps", "bees", "glass", "tides")


def main(run: Path) -> None:
    name, model = list(models_of(run).items())[-1]
    ours = ["zephyr_ray.cli", "serve", str(run), "--models", name, "--context", str(CONTEXT)]
    ours += ["--requests-per-minute", "100000"]
    theirs = ["vllm.entrypoints.openai.api_server", "--model", model]
    theirs += ["--served-model-name", name, "--host", "127.0.0.1", "--dtype", "bfloat16"]
    theirs += ["--max-model-len", str(CONTEXT), "--enforce-eager", "--no-enable-chunked-prefill"]
    theirs += ["--max-num-batched-tokens", "4096", "--generation-config", "vllm"]
    theirs += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    with served(ours) as here, served(theirs) as there:
        for address in (here, there):
            asyncio.run(load(address, name, 2, 4))  # warms up
        for clients in CLIENTS:
            rounds = []
            for number in range(ROUNDS):
                # Each service goes first in every other round.
                order = (here, there) if number % 2 else (there, here)
                results = {a: asyncio.run(load(a, name, clients, ANSWERS[clients])) for a in order}
                rounds.append([results[here], results[there]])
            show(clients, rounds)


@contextmanager
def served(module: list[str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *module, "--port", str(port)]
    environment = os.environ | CPU_ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "WARNING"}
    environment.pop("ZEPHYR_API_KEYS", None)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{module[0]} ended with {process.returncode}")
            time.sleep(1)
            with suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
        yield address
    finally:
        process.terminate()
        process.wait()


async def load(address: str, model: str, clients: int, answers: int) -> dict[str, float]:
    """Measures tokens per second of all clients, and seconds to first token (median, 95th %)."""
    client = openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300
    )
    waiting = iter(range(answers))
    firsts: list[float] = []
    tokens = 0

    async def one() -> None:
        nonlocal tokens
        for number in waiting:
            began = time.monotonic()
            prompt = f"Write {number + 3} facts about {SUBJECTS[number % len(SUBJECTS)]}."
            stream: Any = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            first = None
            async for chunk in stream:
                if first is None and chunk.choices and chunk.choices[0].delta.content:
                    first = time.monotonic() - began
                if chunk.usage:
                    tokens += chunk.usage.completion_tokens
            firsts.append(first or time.monotonic() - began)

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.monotonic() - began
    await client.close()
    firsts.sort()
    return {
        "rate": tokens / seconds,
        "first": statistics.median(firsts),
        "late": firsts[int(0.95 * (len(firsts) - 1))],
    }


def show(clients: int, rounds: list[list[dict[str, float]]]) -> None:
    def median(side: int, what: str) -> float:
        return statistics.median(pair[side][what] for pair in rounds)

    rate = statistics.median(ours["rate"] / theirs["rate"] for ours, theirs in rounds)
    first = statistics.median(ours["first"] / theirs["first"] for ours, theirs in rounds)
    print(
        f"| {clients} | {median(0, 'rate'):.0f} | {median(1, 'rate'):.0f} | {rate:.2f} "
        f"| {median(0, 'first') * 1000:.0f} | {median(1, 'first') * 1000:.0f} | {first:.2f} "
        f"| {median(0, 'late') * 1000:.0f} | {median(1, 'late') * 1000:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
