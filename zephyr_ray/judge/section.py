"""Builds what a finished comparison contributes to the report."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from zephyr_ray.formatting import describe_model, number
from zephyr_ray.judge import wording
from zephyr_ray.judge.figures import FIGURES, left_out
from zephyr_ray.section import (
    Answer,
    Bars,
    Block,
    Chapter,
    Column,
    Interval,
    Place,
    Sample,
    Section,
    Table,
    Text,
)
from zephyr_ray.store import Artifact

SAMPLES = 10

Result = dict[str, Any]
"""The content of result.json."""


def pairwise_section(artifact: Artifact) -> Section:
    """Returns figures, differences and samples of a pairwise stage's artifact."""
    result = json.loads(artifact.file("result.json").read_text(encoding="utf-8"))
    bars, table = _figures(result)
    intro = Text(
        _intro(result, artifact, "; the dashed line marks no difference" if bars else ""), soft=True
    )
    blocks = (intro, *bars, table, *_differences(result), *_by_constraint(result))
    chapters = [Chapter("Result", Place.RESULT, blocks)]
    if samples := _samples(artifact, list(result["models"])):
        explanation = Text(
            "Not hand-picked: the held-out prompts whose ids have the smallest SHA-256 hashes. "
            f"“Win” and “loss” are against “{result['baseline']}”.",
            soft=True,
        )
        title = f"{len(samples)} samples"
        chapters.append(Chapter(title, Place.SAMPLES, (explanation, *samples)))
    return Section(tuple(chapters), wording.headline(result))


def _intro(result: Result, artifact: Artifact, line: str) -> str:
    judge = describe_model(artifact.manifest.models.get(result["judge"], {}))
    prompts = max((m.get("prompts", 0) for m in result["models"].values()), default=0)
    return (
        f"{prompts} held-out prompts, judged by “{result['judge']}”{f' ({judge})' if judge else ''}"
        f", every model against “{result['baseline']}”; a tie counts one half. Thin lines and "
        f"brackets are 95% bootstrap intervals over prompts{line}."
    )


def _figures(result: Result) -> tuple[list[Bars], Table]:
    """Returns the bars of plotted figures, and a table: a column per figure, a row per model."""
    models = result["models"]
    columns = [(f, [f.cell(m, result) for m in models]) for f in FIGURES if f.heading]
    columns = [(f, cells) for f, cells in columns if set(cells) - {None, "baseline"}]
    bars = [
        Bars(
            figure.plot.format(baseline=result["baseline"]),
            tuple((m, c) for m, c in zip(models, cells, strict=True) if isinstance(c, Interval)),
            line=0.5 if figure.compared else None,
        )
        for figure, cells in columns
        if figure.plot
    ]
    omitted = [None if m == result["baseline"] else left_out(models[m]) for m in models]
    table = Table(
        columns=(
            Column("Model"),
            Column("Left out", digits=0),
            *(Column(f.heading, f.digits) for f, _ in columns),
        ),
        rows=tuple(zip(models, omitted, *(cells for _, cells in columns), strict=True)),
        help=(
            "Left out: held-out prompts that the win rate does not include, because an answer is "
            "missing, both are empty, or the judge's reply is unparsable.",
            *(f"{f.heading}: {f.help}" for f, _ in columns if f.help),
        ),
    )
    return bars, table


def _differences(result: Result) -> Iterator[Block]:
    differences = result["differences"]
    if differences:
        interval = Column("Difference", digits=3, signed=True)
        rows = tuple(
            (
                f"{d['a']} − {d['b']}",
                Interval(d["pass_difference"], d["low"], d["high"]),
                wording.certainty(d),
            )
            for d in differences
        )
        title = "Differences in checks passed, on the same prompts"
        yield Table((Column("Models"), interval, Column("Interval")), rows, title)
    yield from map(Text, result["notes"])
    if differences and not result["control"]:
        yield Text(wording.NO_CONTROL, soft=True)


def _by_constraint(result: Result) -> Iterator[Table]:
    """Yields the pass rates by kind of constraint and model, the most frequent kind first."""
    by_model = [m.get("by_constraint", {}) for m in result["models"].values()]
    prompts: dict[str, int] = {}
    for kinds in by_model:
        for kind, rate in kinds.items():
            prompts[kind] = max(prompts.get(kind, 0), rate["prompts"])
    if prompts:
        models = (Column(model, digits=2, shaded=True) for model in result["models"])
        rows = tuple(
            (kind, count, *(kinds.get(kind, {}).get("pass_rate") for kinds in by_model))
            for kind, count in sorted(prompts.items(), key=lambda item: (-item[1], item[0]))
        )
        columns = (Column("Constraint"), Column("Prompts", digits=0), *models)
        yield Table(columns, rows, "Checks passed by kind of constraint")


def _samples(artifact: Artifact, models: list[str]) -> list[Sample]:
    """Returns the prompts whose ids have the smallest hashes, a choice blind to their answers."""
    rows = artifact.rows()
    rows.sort(key=lambda row: hashlib.sha256(str(row["id"]).encode()).hexdigest())
    return [
        Sample(row["prompt"], tuple(_answer(row, m) for m in models if m in row["answers"]))
        for row in rows[:SAMPLES]
    ]


def _answer(row: dict[str, Any], model: str) -> Answer:
    answer, verdict = row["answers"][model], row.get("verdicts", {}).get(model, {})
    facts = []
    if answer.get("score") is not None:
        facts.append(f"score {number(answer['score'], 1)}")
    if answer.get("finish_reason") not in (None, "stop"):
        facts.append(f"cut: {answer['finish_reason']}")
    reasons = [answer.get("reason") or ""]
    if verdict.get("reason") not in (None, *reasons):
        reasons.append(f"Verdict: {verdict['reason']}")
    outcomes: dict[float, Any] = {1: "win", 0.5: "tie", 0: "loss"}
    return Answer(
        model=model,
        text=answer.get("text") or "",
        outcome=outcomes.get(verdict.get("verdict")),
        facts=tuple(facts),
        reasons=tuple(filter(None, reasons)),
    )
