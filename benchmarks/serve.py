"""Compares `zephyr serve` with `vllm serve`: time to first token, and tokens per second.

    .venv/bin/python benchmarks/serve.py runs/quickstart

Both serve the run's newest model on this machine with the same engine settings. The two are
measured alternately, so that a temporary slowdown affects both. Decoding is greedy, 64 tokens per
answer.
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
    with served(ours) as our_url, served(theirs) as their_url:
        for address in (our_url, their_url):
            asyncio.run(measure(address, name, 2, 4))  # warms up
        for clients in CLIENTS:
            rounds = []
            for number in range(ROUNDS):
                # Each service goes first in every other round.
                order = (our_url, their_url) if number % 2 else (their_url, our_url)
                results = {
                    url: asyncio.run(measure(url, name, clients, ANSWERS[clients])) for url in order
                }
                rounds.append([results[our_url], results[their_url]])
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
                raise SystemExit(f"{module[0]} exited with code {process.returncode}")
            time.sleep(1)
            with suppress(httpx.HTTPError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
        yield address
    finally:
        process.terminate()
        process.wait()


async def measure(address: str, model: str, clients: int, answers: int) -> dict[str, float]:
    """Returns the tokens per second over all clients, and the median and 95th percentile of the
    seconds to first token."""
    client = openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300
    )
    questions = iter(range(answers))
    firsts: list[float] = []
    tokens = 0

    async def run_client() -> None:
        nonlocal tokens
        for number in questions:
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
    await asyncio.gather(*(run_client() for _ in range(clients)))
    seconds = time.monotonic() - began
    await client.close()
    firsts.sort()
    return {
        "rate": tokens / seconds,
        "first_median": statistics.median(firsts),
        "first_p95": firsts[int(0.95 * (len(firsts) - 1))],
    }


def show(clients: int, rounds: list[list[dict[str, float]]]) -> None:
    """Prints one Markdown table row: the number of clients, then medians over the rounds of tokens
    per second (ours, theirs, ratio), of milliseconds to first token (ours, theirs, ratio), and of
    their 95th percentile (ours, theirs)."""

    def median(side: int, what: str) -> float:
        return statistics.median(pair[side][what] for pair in rounds)

    rate = statistics.median(ours["rate"] / theirs["rate"] for ours, theirs in rounds)
    first = statistics.median(
        ours["first_median"] / theirs["first_median"] for ours, theirs in rounds
    )
    print(
        f"| {clients} | {median(0, 'rate'):.0f} | {median(1, 'rate'):.0f} | {rate:.2f} "
        f"| {median(0, 'first_median') * 1000:.0f} | {median(1, 'first_median') * 1000:.0f} "
        f"| {first:.2f} "
        f"| {median(0, 'first_p95') * 1000:.0f} | {median(1, 'first_p95') * 1000:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
