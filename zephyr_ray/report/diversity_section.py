"""Builds the report's chapter on diversity, per text artifact and over the turns of dialogues.

The turns matter because refinement narrows the data: every follow-up question is made from the
previous one.
"""

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from zephyr_ray.messages import Message, answers, exchanges, with_facts
from zephyr_ray.models.similarity import diversity
from zephyr_ray.section import Chapter, Column, Interval, Place, Section, Table, Trend
from zephyr_ray.stage import Stage
from zephyr_ray.store import ROWS, Artifact

SAMPLED = 500
"""Maximum rows read per artifact, evenly spaced."""
TURNS = 8
"""Maximum turns in a plot."""
INTRO = (
    f"Measured on up to {SAMPLED} evenly spaced rows of each artifact. A less diverse set "
    "has fewer distinct n-grams, a higher ROUGE-L to the nearest text, and a lower entropy of "
    "first words. Shares of distinct n-grams also fall as texts become longer or more numerous, so "
    "compare like with like."
)
FIGURES = {
    "distinct_1": Column("distinct words", 3),
    "distinct_2": Column("distinct pairs of words", 3),
    "nearest_mean": Column("ROUGE-L to nearest, mean", 3),
    "nearest_max": Column("maximum", 3),
    "openings": Column("distinct first words", 0),
    "openings_bits": Column("entropy of first words, bits", 2),
}
"""Columns by the name of their figure in `diversity`."""
Row = dict[str, Any]
Turn = tuple[str, str]
"""Question and answer."""


def diversity_section(stages: dict[str, Stage], inputs: dict[str, Artifact]) -> Section | None:
    """Returns the chapter on all text artifacts; None if there are none."""
    table_rows: list[tuple[str | float, ...]] = []
    trends: dict[str, list[tuple[str, list[float]]]] = {"distinct_2": [], "nearest_mean": []}
    for name, artifact in inputs.items():
        read_texts = TEXTS.get(stages[name].makes)
        rows = _sample(artifact) if read_texts else []
        if not read_texts or not rows:
            continue
        for what, texts in read_texts(rows).items():
            figures = diversity(texts)
            values = [figures.get(figure, 0) for figure in FIGURES]
            table_rows.append((f"{name}: {what}", len(texts), *values))
        for what, by_turn in _by_turn(rows):
            for figure, series in trends.items():
                series.append((f"{name}: {what}", [f[figure] for f in map(diversity, by_turn)]))
    if not table_rows:
        return None
    plots = [_trend(figure, series) for figure, series in trends.items() if series]
    table = Table((Column("texts"), Column("number", 0), *FIGURES.values()), tuple(table_rows))
    return Section((Chapter("Diversity", Place.PROCESS, (*plots, table), INTRO),))


def _sample(artifact: Artifact) -> list[Row]:
    total = int(artifact.manifest.counts.get("rows", 0))
    with artifact.file(ROWS).open("rb") as lines:
        step = max(1, math.ceil(total / SAMPLED))
        return [with_facts(json.loads(line)) for line in islice(lines, 0, None, step)]


def _by_turn(rows: list[Row]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields the questions and the answers of dialogues by turn, for the turns that at least half
    of the dialogues reach. All turns are from the same dialogues, so that they can be compared."""
    dialogues = [list(_turns(row["messages"])) for row in rows if "messages" in row]
    reached = sorted(map(len, dialogues), reverse=True)
    last = min(reached[(len(reached) - 1) // 2], TURNS) if reached else 0
    if last < 2:
        return
    dialogues = [turns for turns in dialogues if len(turns) >= last]
    for side, what in enumerate(("questions", "answers")):
        yield what, [[turns[turn][side] for turns in dialogues] for turn in range(last)]


def _turns(messages: list[Message]) -> Iterator[Turn]:
    for exchange in exchanges(messages):
        if exchange.questions:
            asked = (messages[index] for index in exchange.questions)
            questions = [m.get("instruction", m["content"]) for m in asked]
            yield "\n".join(questions), messages[exchange.answer]["content"]


def _trend(figure: str, series: list[tuple[str, list[float]]]) -> Trend:
    heading = FIGURES[figure].heading
    title = heading[0].upper() + heading[1:]
    lines = (
        (name, tuple((turn, Interval(value, value, value)) for turn, value in enumerate(values, 1)))
        for name, values in series
    )
    return Trend(title, "turn", tuple(lines))


def _texts_of_dialogues(rows: list[Row]) -> dict[str, list[str]]:
    turns = [turn for row in rows for turn in _turns(row["messages"])]
    return {"questions": [q for q, _ in turns], "answers": [a for _, a in turns]}


def _texts_of_pairs(rows: list[Row]) -> dict[str, list[str]]:
    sides = {side: [answers(row[side])[-1]["content"] for row in rows] for side in SIDES}
    return {"prompts": [row["instruction"] for row in rows], **sides}


SIDES = ("chosen", "rejected")
TEXTS: dict[str, Callable[[list[Row]], dict[str, list[str]]]] = {
    "prompts": lambda rows: {"instructions": [row["instruction"] for row in rows]},
    "dialogues": _texts_of_dialogues,
    "completions": lambda rows: {"answers": [c["text"] for r in rows for c in r["completions"]]},
    "pairs": _texts_of_pairs,
}
"""Texts of rows, by type of artifact."""
