"""Builds what a finished comparison contributes to the report."""

import hashlib
import json
from typing import Any

from zephyr_ray.formatting import describe_model, number
from zephyr_ray.judge import wording
from zephyr_ray.judge.figures import FIGURES, Figure
from zephyr_ray.section import (
    Answer,
    Bars,
    Block,
    Cell,
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
"""The content of result.json; one written by an earlier version may lack parts."""


def pairwise_section(artifact: Artifact) -> Section:
    """Returns figures, differences and samples of a pairwise stage's artifact."""
    result = json.loads((artifact.folder / "result.json").read_text(encoding="utf-8"))
    blocks = [
        Text(_intro(result, artifact), soft=True),
        *_bars(result),
        _figures(result),
        *_differences(result),
        *_by_constraint(result),
    ]
    chapters = [Chapter("Result", Place.RESULT, tuple(blocks))]
    if samples := _samples(artifact, list(result["models"])):
        explained = Text(
            "Not picked by anyone: the held-out prompts whose ids have the smallest SHA-256. "
            f"“Win” and “loss” are against “{result['baseline']}”.",
            soft=True,
        )
        title = f"{len(samples)} samples"
        chapters.append(Chapter(title, Place.SAMPLES, (explained, *samples)))
    return Section(tuple(chapters), wording.headline(result))


def _intro(result: Result, artifact: Artifact) -> str:
    judge = describe_model(artifact.manifest.models.get(result["judge"], {}))
    prompts = max((m.get("prompts", 0) for m in result["models"].values()), default=0)
    line = "; the dashed line is no difference" if _bars(result) else ""
    return (
        f"{prompts} held-out prompts, judged by “{result['judge']}”{f' ({judge})' if judge else ''}"
        f", every model against “{result['baseline']}”; a tie counts one half. Thin lines and "
        f"brackets are 95 % bootstrap intervals over prompts{line}."
    )


def _bars(result: Result) -> list[Bars]:
    drawn = []
    for figure in FIGURES:
        cells = {model: _cell(figure, model, result) for model in result["models"]}
        bars = tuple((m, cell) for m, cell in cells.items() if isinstance(cell, Interval))
        if figure.plot and bars:
            title = figure.plot.format(baseline=result["baseline"])
            drawn.append(Bars(title, bars, 0.5 if figure.compared else None))
    return drawn


def _figures(result: Result) -> Table:
    """One row per model; a figure that no model has, as in a result of an older version, is left
    out."""
    models = result["models"]
    figures = [
        f for f in FIGURES if f.heading and any(f.shown(m) is not None for m in models.values())
    ]
    return Table(
        columns=(Column("Model"), *(Column(f.heading, f.digits) for f in figures)),
        rows=tuple((m, *(_cell(f, m, result) for f in figures)) for m in models),
        help=tuple(f"{f.heading}: {f.help}" for f in figures if f.help),
    )


def _cell(figure: Figure, model: str, result: Result) -> Cell:
    if figure.compared and model == result["baseline"]:
        return "baseline" if figure.plot else None
    return figure.shown(result["models"][model])


def _differences(result: Result) -> list[Block]:
    differences = result.get("differences", [])
    blocks: list[Block] = []
    if differences:
        columns = (
            Column("Models"),
            Column("Difference", digits=3, signed=True),
            Column("Interval"),
        )
        rows = tuple(
            (
                f"{d['a']} − {d['b']}",
                Interval(d["pass_difference"], d["low"], d["high"]),
                wording.certainty(d),
            )
            for d in differences
        )
        blocks.append(Table(columns, rows, "Differences in checks passed, on the same prompts"))
    blocks += [Text(note) for note in result.get("notes", [])]
    if differences and not result.get("control"):
        blocks.append(Text(wording.NO_CONTROL, soft=True))
    return blocks


def _by_constraint(result: Result) -> list[Table]:
    """Pass rates by kind of constraint and model, the most frequent kind first."""
    by_model = [m.get("by_constraint") or {} for m in result["models"].values()]
    prompts: dict[str, int] = {}
    for kinds in by_model:
        for kind, cell in kinds.items():
            prompts[kind] = max(prompts.get(kind, 0), cell["prompts"])
    if not prompts:
        return []
    models = (Column(model, digits=2, shaded=True) for model in result["models"])
    rows = tuple(
        (kind, count, *(kinds.get(kind, {}).get("pass_rate") for kinds in by_model))
        for kind, count in sorted(prompts.items(), key=lambda item: (-item[1], item[0]))
    )
    columns = (Column("Constraint"), Column("Prompts", digits=0), *models)
    return [Table(columns, rows, "Checks passed by kind of constraint")]


def _samples(artifact: Artifact, models: list[str]) -> list[Sample]:
    """The prompts whose ids have the smallest hashes: nobody chose them for their answers."""
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
