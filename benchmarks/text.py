"""Measures how fast rows are answered, by local engines and by endpoints.

    flock LOCK .venv/bin/python -m benchmarks.text --out FOLDER [--sections engines endpoint limit]

- engines: Ray Data with this project's vLLM actor against plain `vllm.LLM.chat`, on the same rows
  with the same sampling, one engine of one thread each. Both are warmed up, then measured
  alternately, in answer tokens per second, so that neither startup nor the length of answers
  counts. A row with two turns asks again as soon as it has its first answer; plain vLLM
  answers all first turns, then all second ones.
- endpoint: the client against a server with 200 ms latency, at 256 requests in flight.
- limit: the client at a limit of requests per minute.

Rows are run as in a stage: with `run_rows`, a journal and the answer log. A pass is timed from the
first row's request to the last row's answer, so Ray's start and planning are excluded.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.slow_endpoint import arrivals, bare_rate, slow_endpoint
from zephyr_ray.engines.answer_log import AnswerLog
from zephyr_ray.engines.governor import Governor
from zephyr_ray.engines.meter import Meter
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.engines.pool import EnginePool
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.engines.vllm import CPU_ENVIRONMENT, VllmSettings, engine_arguments
from zephyr_ray.messages import assistant, user
from zephyr_ray.models.weights import resolve
from zephyr_ray.rows import run_rows
from zephyr_ray.spending import CALLS_AT_ONCE
from zephyr_ray.stage import Work

WEIGHTS, CONTEXT = "smollm2-135m-instruct", 1024
ROWS, ROUNDS, ROWS_IN_FLIGHT = 96, 2, 64
MOST_TOKENS = 256
"""Maximum tokens per answer. Most answers end earlier, at different steps of a batch."""
TASKS = Path(__file__).parents[1] / "configs" / "seeds" / "heldout.jsonl"
FOLLOW_UP = "Say the same in one sentence."
LATENCY, REQUESTS, IN_FLIGHT = 0.2, 12_000, 256
LIMIT, MINUTE = 6000, 60.0
"""Requests per minute."""


class Report:
    """Prints results and writes them to text.md. (`benchmarks.report` is not used, because it
    imports torch before the number of threads is set.)"""

    def __init__(self, folder: Path):
        self.folder = folder

    def line(self, text: str, **values: Any) -> None:
        parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        line = f"{text}: {', '.join(parts)}"
        print(line, flush=True)
        with (self.folder / "text.md").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Passes:
    """Passes over rows, each in a new folder, by engines that stay up."""

    def __init__(self, folder: Path):
        self._folder, self._engines, self._count = folder, EnginePool(), 0

    def run(
        self, settings: ModelSettings, rows: int, meter: Meter | None = None, turns: int = 1
    ) -> dict[str, float]:
        """Returns rows and tokens per second, and the seconds including Ray's planning."""
        self._count += 1
        folder = self._folder / f"pass{self._count}"
        work = Work("pass", folder, 0, {}, {}, {}, engines=self._engines)
        model = Model("peer", settings, answers=AnswerLog(folder / "answers", 0), meter=meter)

        async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
            began, messages, tokens = time.monotonic(), [], 0
            for turn in range(turns):
                messages.append(user(FOLLOW_UP if turn else row["prompt"]))
                reply = await ask(messages, max_tokens=MOST_TOKENS)
                messages.append(assistant(reply.text))
                tokens += reply.completion_tokens
            return {**row, "tokens": tokens, "began": began, "ended": time.monotonic()}

        called = time.monotonic()
        made = run_rows(work, [{"id": p, "prompt": p} for p in prompts(rows)], program, [model])
        seconds = max(r["ended"] for r in made) - min(r["began"] for r in made)
        return {
            "rows": len(made) / seconds,
            "tokens": sum(r["tokens"] for r in made) / seconds,
            "with plan": time.monotonic() - called,
        }

    def close(self) -> None:
        self._engines.close()


def prompts(count: int) -> list[str]:
    """Returns distinct prompts: the quickstart's held-out tasks, numbered if they repeat."""
    tasks = [json.loads(line)["instruction"] for line in TASKS.open(encoding="utf-8")]
    rounds = range(-(-count // len(tasks)))
    return [f"{task} ({n})" if n else task for n in rounds for task in tasks][:count]


def plain_chat() -> Callable[[int], float]:
    """Starts plain vLLM; returns a function that measures its tokens per second for some turns."""
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(resolve(WEIGHTS), CONTEXT, 0, 0)
    llm = LLM(**arguments, max_num_seqs=ROWS_IN_FLIGHT)

    def measure(turns: int, rows: int = ROWS) -> float:
        sampling = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=MOST_TOKENS)
        conversations: list[Any] = [[] for _ in range(rows)]
        tokens, began = 0, time.monotonic()
        for turn in range(turns):
            for messages, prompt in zip(conversations, prompts(rows), strict=True):
                messages.append(user(FOLLOW_UP if turn else prompt))
            outputs = llm.chat(conversations, sampling, use_tqdm=False)
            for messages, output in zip(conversations, outputs, strict=True):
                messages.append(assistant(output.outputs[0].text))
                tokens += len(output.outputs[0].token_ids)
        return tokens / (time.monotonic() - began)

    measure(1, 4)
    return measure


def engines(report: Report, passes: Passes) -> None:
    plain = plain_chat()
    settings = VllmSettings(weights=WEIGHTS, context=CONTEXT, concurrency=ROWS_IN_FLIGHT)
    passes.run(settings, 4)
    for turns in (1, 2):
        pairs = []
        for number in range(ROUNDS):
            # Each goes first in every other round.
            first = plain(turns) if number % 2 else 0.0
            ours = passes.run(settings, ROWS, turns=turns)
            pairs.append((ours["tokens"], first or plain(turns)))
        report.line(
            f"vLLM, {turns} turn(s), {ROWS} rows",
            **{
                "ours, tokens/s": statistics.median(ours for ours, _ in pairs),
                "plain, tokens/s": statistics.median(theirs for _, theirs in pairs),
                "ours / plain": statistics.median(ours / theirs for ours, theirs in pairs),
                "ratios": " ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs),
                "last pass with Ray's plan, s": ours["with plan"],
            },
        )


def endpoint(report: Report, passes: Passes) -> None:
    with slow_endpoint(0.0) as address:
        ceiling = asyncio.run(bare_rate(address, IN_FLIGHT, REQUESTS))
    report.line("bare client, no latency", **{"requests/s": ceiling})
    with slow_endpoint(LATENCY) as address:
        bare = asyncio.run(bare_rate(address, IN_FLIGHT, REQUESTS // 2))
        report.line("bare client, 200 ms", **{"requests/s": bare})
        free = peer(address)
        priced = peer(address, price=(1.0, 2.0))
        passes.run(free, 2 * IN_FLIGHT)
        for name, settings in {"client": free, "client with a price": priced}.items():
            rate = passes.run(settings, REQUESTS, meter(settings, report.folder))["rows"]
            report.line(
                f"{name}, 200 ms, {IN_FLIGHT} in flight",
                **{
                    "requests/s": rate,
                    "of capacity": rate * LATENCY / IN_FLIGHT,
                    "of the bare client": rate / bare,
                },
            )


def limit(report: Report, passes: Passes) -> None:
    with slow_endpoint(LATENCY) as address:
        settings = peer(address, requests_per_minute=LIMIT)
        passes.run(settings, round(1.1 * LIMIT), meter(settings, report.folder))
        times = sorted(arrivals(address))
    rate = (len(times) - 1) / (times[-1] - times[0]) * MINUTE
    most = max(bisect_left(times, time + MINUTE) - at for at, time in enumerate(times))
    report.line(
        f"limit of {LIMIT} requests per minute",
        **{
            "requests per minute": rate,
            "of the limit": rate / LIMIT,
            "most in any minute": most,
            "most of the limit": most / LIMIT,
        },
    )


def peer(address: str, **settings: Any) -> OpenAISettings:
    return OpenAISettings(model="peer", base_url=f"{address}/v1", concurrency=IN_FLIGHT, **settings)


def meter(settings: OpenAISettings, folder: Path) -> Meter | None:
    """Returns a model's meter, made as in a run; None without a price or a limit."""
    import ray

    if (tariff := settings.tariff()) is None:
        return None
    governor = ray.remote(Governor).options(num_cpus=0, max_concurrency=CALLS_AT_ONCE)
    name = f"ledger{time.monotonic_ns()}"
    return Meter(governor.remote(folder / name, name, {"peer": tariff}), "pass", "peer")


SECTIONS = {"engines": engines, "endpoint": endpoint, "limit": limit}


def main(out: Path, names: list[str]) -> None:
    os.environ.update(CPU_ENVIRONMENT)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    from zephyr_ray.ray_cluster import connect

    out.mkdir(parents=True)
    report = Report(out)
    connect()
    for name in names:
        passes = Passes(out / name)
        SECTIONS[name](report, passes)
        passes.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    main(arguments.out.absolute(), arguments.sections)
