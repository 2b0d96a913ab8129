"""Draws system prompts that ask for a principle, as UltraFeedback does (arXiv 2310.01377).

The principles and their proportions per source of prompts are UltraFeedback's; the sentences are
our own.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from zephyr_ray.section import Block, Cell, Column, Table
from zephyr_ray.store import content_key

VARIANTS = {
    "helpfulness": (
        "Give the most useful answer you can, and follow the request to the letter.",
        "Find out what the person needs, and write the answer that serves that need best.",
        "Be concrete: prefer steps, examples and figures to general remarks.",
        "Answer every part of the question, and explain what a beginner would stumble over.",
        "Write as a knowledgeable friend would: clear, warm and to the point.",
        "Add the one thing that the person did not ask for but will need next.",
    ),
    "truthfulness": (
        "State only facts that are true, and never invent one.",
        "Before you write a name, a date or a figure, make sure that it is right.",
        "If the question assumes something false, say so before you answer.",
        "Keep to what is well established, and leave out rumors and guesses.",
        "Use the facts in the request as they are, and add none that contradict them.",
        "Prefer a short answer that is correct to a long one that may contain an error.",
    ),
    "honesty": (
        "Say what you think is so, and say plainly what you do not know.",
        "Mark a guess as a guess, and be firm only where you are sure.",
        "If you cannot know the answer, admit it instead of making one up.",
        "Let your choice of words show how certain you are of each statement.",
        "Do not pretend to have seen, done or felt anything.",
        "Where experts disagree or you have doubts, tell the reader.",
    ),
    "verbalized_calibration": (
        "Answer, then write on a line of its own how sure you are, such as: Confidence: 70%",
        "End with the probability, in percent, that your answer is correct.",
        "After the answer, rate your confidence in it from 0% to 100% on a last line.",
        "Close with a line 'Confidence: N%', where N of 100 such answers would be right.",
        "Finish by giving your certainty as a percentage; use a low one if you are guessing.",
    ),
}
"""System prompts by principle; the principles have the names that UltraFeedback's data uses."""
_CHAT = {
    "helpfulness": 0.6,
    "truthfulness": 0.2,
    "honesty": 0.18,
    "verbalized_calibration": 0.02,
}
_TRUTHFUL = {"truthfulness": 1.0}
PROPORTIONS = {
    "evol_instruct": {"helpfulness": 1.0},
    "false_qa": _TRUTHFUL,
    "flan": {"helpfulness": 0.6, "truthfulness": 0.2, "verbalized_calibration": 0.2},
    "sharegpt": _CHAT,
    "truthful_qa": _TRUTHFUL,
    "ultrachat": _CHAT,
}
"""Shares of the principles by the `source` of a prompt, as in the table of UltraFeedback's README.
The data names each part of FLAN, such as flan_v2_cot."""
OTHER = _CHAT
"""Shares for prompts of any other source: those of UltraChat and ShareGPT."""


@dataclass(frozen=True)
class Principle:
    """A principle, and the system prompt that asks for it."""

    name: str
    system: str


def draw(seed: int, row: dict[str, Any]) -> Principle:
    """Draws the principle of one answer; `row` is a request of a `ModelPool`. The draw depends
    on the seed, prompt, model and answer number, not on the other models of the pool."""
    source = str(row.get("source"))
    shares = PROPORTIONS.get("flan" if source.startswith("flan") else source, OTHER)
    key = [seed, row["prompt"], row["member"], row["sample"]]
    rng = random.Random(json.dumps(key))
    [name] = rng.choices(list(shares), list(shares.values()))
    return Principle(name, rng.choice(VARIANTS[name]))


def texts_hash() -> str:
    """Returns a hash of the sentences and proportions, for content keys."""
    return content_key({"variants": VARIANTS, "proportions": PROPORTIONS, "other": OTHER})


def principle_table(completions: Iterable[dict[str, Any]]) -> list[Block]:
    """Returns a table of the answers by principle, with their mean score if they have scores; no
    block if no answer has a principle."""
    by_principle: dict[str, list[dict[str, Any]]] = {}
    for completion in completions:
        # Answers from earlier versions and from votes have no principle.
        if name := completion.get("principle"):
            by_principle.setdefault(name, []).append(completion)
    total = sum(map(len, by_principle.values()))
    rows: list[tuple[Cell, ...]] = []
    for name in sorted(by_principle):
        answers = by_principle[name]
        scores = [a["score"] for a in answers if a.get("score") is not None]
        mean = (sum(scores) / len(scores),) if scores else ()
        rows.append((name, len(answers), len(answers) / total, *mean))
    columns = (
        Column("principle"),
        Column("answers", digits=0),
        Column("share", digits=2),
        Column("mean score", digits=2),
    )
    width = max(map(len, rows), default=0)
    padded = tuple((*row, *[None] * (width - len(row))) for row in rows)
    return [Table(columns[:width], padded, "Answers by principle")] if rows else []
