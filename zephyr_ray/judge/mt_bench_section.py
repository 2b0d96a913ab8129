"""Builds what judged two-turn answers contribute to the report."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from zephyr_ray.formatting import describe_model, number, signed, with_interval
from zephyr_ray.judge.mt_bench_figures import Estimate, ordered
from zephyr_ray.judge.samples import NOT_HAND_PICKED, blind_sample
from zephyr_ray.judge.wording import direction, few_questions
from zephyr_ray.section import (
    Answer,
    Bars,
    Block,
    Cell,
    Chapter,
    Column,
    Interval,
    Pair,
    Place,
    Radar,
    Sample,
    Section,
    Table,
    Text,
    Trend,
)
from zephyr_ray.store import Artifact

SAMPLES = 4
TURN_NAMES = {"1": "first turn", "2": "second turn"}

Result = dict[str, Any]
"""The content of result.json."""


def mt_bench_section(artifact: Artifact) -> Section:
    """Returns figures, plots and samples of a `mt_bench` stage's artifact."""
    result = json.loads(artifact.file("result.json").read_text(encoding="utf-8"))
    blocks: tuple[Block, ...] = (
        Text(_intro(result, artifact), soft=True),
        *_turn_plots(result),
        *_radar(result),
        _figures(result),
        _categories(result),
        *_differences(result),
    )
    chapters = [Chapter("Two-turn questions", Place.RESULT, blocks)]
    if samples := _samples(artifact, result):
        explanation = Text(NOT_HAND_PICKED.format(rows="questions"), soft=True)
        chapters.append(Chapter("Two-turn samples", Place.SAMPLES, (explanation, *samples)))
    return Section(tuple(chapters), headline(result))


def headline(result: Result) -> str:
    """Says how the last model did, and how it differs from the first one."""
    *_, last = result["models"]
    figures = result["models"][last]
    overall = figures["overall"]
    if overall is None:
        return f"{last} has no readable judgement of its two-turn answers."
    what = f"a win rate against {result['baseline']}" if result["baseline"] else "a score"
    text = (
        f"{last} has {what} of {_words(overall)}{'' if result['baseline'] else ' out of 10'} on "
        f"{result['questions']} two-turn questions"
    )
    if omitted := figures["asked"] - figures["read"]:
        text += f" ({omitted} of {figures['asked']} turns without a readable judgement)"
    if result["differences"]:
        first = result["differences"][0]
        text += f"; against {first['b']}: {_words(first, partial(signed, digits=2))}"
        text += _doubt(first, 0.0)
    elif result["baseline"]:
        text += _doubt(overall, 0.5)
    return f"{text}.{few_questions(result['questions'])}"


def _intro(result: Result, artifact: Artifact) -> str:
    judge = describe_model(artifact.manifest.models.get(result["judge"], {}))
    how = (
        f"every model against “{result['baseline']}” in both orders; a tie counts one half"
        if result["baseline"]
        else "each answer by itself, from 1 (worst) to 10 (best)"
    )
    return (
        f"{result['questions']} questions of two turns, judged by “{result['judge']}”"
        f"{f' ({judge})' if judge else ''}: {how}. Brackets are 95% intervals; both turns of a "
        "question count as one observation, because the second depends on the first."
    )


def _turn_plots(result: Result) -> list[Block]:
    """Returns the overall win rates as bars, or the scores by turn."""
    models = result["models"]
    if result["baseline"]:
        title = f"Win rate against {result['baseline']}, two turns"
        rates = tuple((m, _to_interval(f["overall"])) for m, f in models.items() if f["overall"])
        return [Bars(title, rates, line=0.5, figure="win_rate")] if rates else []
    series = tuple(
        (model, tuple((TURN_NAMES[t], _to_interval(e)) for t, e in figures["turns"].items() if e))
        for model, figures in models.items()
    )
    series = tuple((model, points) for model, points in series if points)
    return [Trend("Score", "turn", series)] if series else []


def _radar(result: Result) -> list[Radar]:
    """Returns the mean of each category, on the scale of the judgements; nothing for fewer than
    three categories, which make no area."""
    categories = _category_names(result)
    if len(categories) < 3:
        return []
    series = tuple(
        (
            model,
            tuple((figures["categories"].get(c) or {}).get("mean") for c in categories),
        )
        for model, figures in result["models"].items()
    )
    lowest, highest = (0.0, 1.0) if result["baseline"] else (1.0, 10.0)
    title = "Win rate by category" if result["baseline"] else "Score by category"
    return [Radar(title, tuple(categories), series, lowest, highest)]


def _figures(result: Result) -> Table:
    models = result["models"]
    name = "Win rate" if result["baseline"] else "Score"
    columns = [Column("Model"), Column(name, 2)]
    columns += [Column(turn.capitalize(), 2) for turn in TURN_NAMES.values()]
    missing = "turns without an answer, or whose judgement failed"
    if result["baseline"]:
        missing += ", or in which both answers are empty"
    help_ = [
        f"Missing: {missing}.",
        "Unparsable: judgements whose reply could not be read, after a second request that named "
        "the fault. The means exclude missing and unparsable turns.",
    ]
    if result["baseline"]:
        columns += [Column("Wins / ties / losses", 0), Column("Flips", 0)]
        help_.append("Flips: verdicts that changed with the order of the answers.")
    columns += [Column("Turns", 0), Column("Missing", 0), Column("Unparsable", 0)]
    rows = []
    for model, figures in models.items():
        cells: list[Cell] = [model, _cell(figures["overall"])]
        cells += [_cell(figures["turns"][turn]) for turn in TURN_NAMES]
        if result["baseline"]:
            tally = [figures.get(name, 0) for name in ("wins", "ties", "losses")]
            cells += [tuple(tally), figures.get("flips", 0)]
        rows.append((*cells, figures["asked"], figures["missing"], figures["unparsable"]))
    return Table(tuple(columns), tuple(rows), help=tuple(help_))


def _categories(result: Result) -> Table:
    models = result["models"]
    columns = (Column("Category"), *(Column(model, 2) for model in models))
    rows = tuple(
        (category, *(_cell(f["categories"].get(category)) for f in models.values()))
        for category in _category_names(result)
    )
    help_ = (
        "Intervals over few questions are too narrow: that of two questions is their range, and "
        "one question has none. Compare models by their overall mean."
    )
    return Table(columns, rows, "By category", (help_,))


def _differences(result: Result) -> list[Block]:
    if not result["differences"]:
        return []
    rows = tuple((Pair(d["a"], d["b"]), _to_interval(d)) for d in result["differences"])
    columns = (Column("Models"), Column("Difference", 2, signed=True))
    measure = "win rate" if result["baseline"] else "score"
    return [Table(columns, rows, f"Differences in {measure}, on the same turns")]


def _category_names(result: Result) -> list[str]:
    return ordered({name for f in result["models"].values() for name in f["categories"]})


def _samples(artifact: Artifact, result: Result) -> list[Sample]:
    return [
        Sample(
            "\n\n".join(f"{n}. {turn}" for n, turn in enumerate(row["turns"], 1)),
            tuple(_answer(row, model, result) for model in row["answers"]),
            row["category"],
        )
        for row in blind_sample(artifact.rows(), SAMPLES)
    ]


def _answer(row: dict[str, Any], model: str, result: Result) -> Answer:
    turns = row["answers"][model]
    judgements = [j or {} for j in row["judgements"].get(model, [])]
    label = "win share" if result["baseline"] else "score"
    return Answer(
        model=model,
        text="\n\n".join(f"{n}. {(t or {}).get('text') or '–'}" for n, t in enumerate(turns, 1)),
        facts=tuple(
            f"turn {n}: {label} {number(j['value'], 1)}"
            for n, j in enumerate(judgements, 1)
            if j.get("value") is not None
        ),
        reasons=tuple(f"Turn {n}: {j['reason']}" for n, j in enumerate(judgements, 1) if j),
    )


def _cell(estimate: Estimate | None) -> Cell:
    """Returns the mean with its interval, which cannot be computed from one question."""
    if estimate is None:
        return None
    return _to_interval(estimate) if estimate["questions"] > 1 else estimate["mean"]


def _to_interval(estimate: Estimate) -> Interval:
    mean = estimate["mean"]
    return Interval(mean, estimate["low"], estimate["high"])


def _words(estimate: Estimate, form: Callable[[float], str] = number) -> str:
    return with_interval(estimate["mean"], estimate["low"], estimate["high"], form)


def _doubt(estimate: Estimate, even: float) -> str:
    """Returns the end of a sentence about an interval; empty if it excludes `even`."""
    if direction(estimate["low"], estimate["high"], even):
        return ""
    return ", which cannot be distinguished from no difference"
