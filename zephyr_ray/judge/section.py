"""Builds what a finished comparison contributes to the report."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from zephyr_ray.engines.ledger import PAID
from zephyr_ray.formatting import describe_model, dollars, duration, number
from zephyr_ray.judge import wording
from zephyr_ray.judge.earlier import Result, complete
from zephyr_ray.judge.figures import FIGURES, Figure, left_out, read
from zephyr_ray.judge.samples import NOT_HAND_PICKED, blind_sample
from zephyr_ray.judge.scatters import scatters
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
    Sample,
    Section,
    Table,
    Text,
)
from zephyr_ray.store import Artifact

SAMPLES = 20


def pairwise_section(artifact: Artifact) -> Section:
    """Returns figures, differences and samples of a pairwise stage's artifact."""
    rows = artifact.rows()
    stored = json.loads(artifact.file("result.json").read_text(encoding="utf-8"))
    result = complete(stored, rows, artifact.manifest.settings.get("seed", 0))
    bars, tables = _figures(result)
    intro = Text(
        _intro(result, artifact, "; the dashed line marks no difference" if bars else ""), soft=True
    )
    blocks: tuple[Block, ...] = (
        intro,
        *bars,
        tables[0],
        *map(Text, wording.length_notes(result)),
        *tables[1:],
        *scatters(rows, result["baseline"]),
        *_differences(result),
        *_by_constraint(result),
    )
    chapters = [Chapter("Result", Place.RESULT, blocks)]
    if samples := _samples(rows, list(result["models"]), result["baseline"]):
        explanation = Text(
            f"{NOT_HAND_PICKED.format(rows='held-out prompts')} “Win” and “loss” are against "
            f"“{result['baseline']}”.",
            soft=True,
        )
        # The title has no number, because the page joins the chapters of several stages by title.
        chapters.append(Chapter("Samples", Place.SAMPLES, (explanation, *samples)))
    return Section(tuple(chapters), wording.headline(result))


def _intro(result: Result, artifact: Artifact, line: str) -> str:
    judge = describe_model(artifact.manifest.models.get(result["judge"], {}))
    prompts = max((m.get("prompts", 0) for m in result["models"].values()), default=0)
    return (
        f"{prompts} held-out prompts, judged by “{result['judge']}”{f' ({judge})' if judge else ''}"
        f", every model against “{result['baseline']}”; a tie counts one half. Thin lines and "
        f"brackets are 95% intervals over prompts{line}. {_cost(result['judge'], artifact)}"
    )


def _cost(judge: str, artifact: Artifact) -> str:
    """Says what the judge cost in time and, if its endpoint has a price or a limit, in dollars."""
    paid = {
        name.removeprefix(f"{PAID}{judge}/"): count
        for name, count in artifact.manifest.counts.items()
        if name.startswith(f"{PAID}{judge}/")
    }
    text = f"Judging took {duration(artifact.manifest.seconds)}"
    if not paid:
        return f"{text}."
    known, unknown = paid.get("dollars", 0), paid.get("unknown_dollars", 0)
    requests = paid.get("requests", 0) + paid.get("unknown_requests", 0)
    at_most = "at most " if unknown else ""
    return (
        f"{text} and cost {at_most}{dollars(known + unknown)} in {number(int(requests))} requests."
    )


def _figures(result: Result) -> tuple[list[Bars], list[Table]]:
    """Returns the bars of plotted figures, and tables with a column per figure and a row per model:
    the figures, and how the win rates came about."""
    models = result["models"]
    columns = [(f, [f.cell(m, result) for m in models]) for f in FIGURES if f.heading]
    columns = [(f, cells) for f, cells in columns if set(cells) - {None, "baseline"}]
    bars = [
        Bars(
            figure.plot.format(baseline=result["baseline"]),
            tuple((m, c) for m, c in zip(models, cells, strict=True) if isinstance(c, Interval)),
            line=0.5 if figure.compared else None,
            figure=figure.names[0],
            differences=tuple(_win_differences(result)) if figure.names[0] == "win_rate" else (),
        )
        for figure, cells in columns
        if figure.plot
    ]
    omitted = [None if m == result["baseline"] else left_out(models[m]) for m in models]
    table = _table(
        [Column("Model"), Column("Left out", digits=0)],
        [models, omitted],
        [(figure, cells) for figure, cells in columns if not figure.behind],
        "Left out: held-out prompts that the win rate does not include, because an answer is "
        "missing, both are empty, or the judge's reply is unparsable.",
    )
    compared = [model for model in models if model != result["baseline"]]
    asked = [read(models[model]) + left_out(models[model]) for model in compared]
    coverage = [
        read(models[model]) / count if count else None
        for model, count in zip(compared, asked, strict=True)
    ]
    behind = _table(
        [Column("Model"), Column("Asked", digits=0), Column("Coverage", digits=2)],
        [compared, asked, coverage],
        [
            (f, [cell for m, cell in zip(models, cells, strict=True) if m in compared])
            for f, cells in columns
            if f.behind
        ],
        "Coverage: share of the prompts whose verdict could be read.",
        title="How the win rates came about",
    )
    return bars, [table, behind] if compared else [table]


def _table(
    first: list[Column],
    first_cells: list[Iterable[Cell]],
    figures: list[tuple[Figure, list[Cell]]],
    help: str,
    title: str = "",
) -> Table:
    """Returns a table with the given first columns, then a column per figure."""
    return Table(
        (*first, *(Column(f.heading, f.digits, signed=f.signed) for f, _ in figures)),
        tuple(zip(*first_cells, *(cells for _, cells in figures), strict=True)),
        title,
        (help, *(f"{f.heading}: {f.help}" for f, _ in figures if f.help)),
    )


def _differences(result: Result) -> Iterator[Block]:
    for listed, name, figure in wording.DIFFERENCES:
        rows = tuple(
            (
                Pair(d["a"], d["b"]),
                Interval(d[name], d["low"], d["high"]),
                wording.certainty(d),
            )
            for d in result[listed]
        )
        if rows:
            columns = (Column("Models"), Column("Difference", 3, signed=True), Column("Interval"))
            yield Table(columns, rows, f"Differences in {figure}, on the same prompts")
    if note := wording.control_note(result):
        yield Text(note)
    elif result["differences"]:
        yield Text(wording.NO_CONTROL, soft=True)


def _win_differences(result: Result) -> Iterator[tuple[str, str, Interval]]:
    for entry in result["win_differences"]:
        yield entry["a"], entry["b"], Interval(entry["win_difference"], entry["low"], entry["high"])


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


def _samples(rows: list[dict[str, Any]], models: list[str], baseline: str) -> list[Sample]:
    models = [baseline, *(model for model in models if model != baseline)]
    return [
        Sample(
            row["prompt"],
            tuple(_answer(row, m, baseline) for m in models if m in row["answers"]),
            kind=(row.get("constraint") or {}).get("kind", ""),
        )
        for row in blind_sample(rows, SAMPLES)
    ]


def _answer(row: dict[str, Any], model: str, baseline: str) -> Answer:
    answer, verdict = row["answers"][model], row.get("verdicts", {}).get(model, {})
    if model == baseline:
        verdict = {}  # its comparison with itself
    facts = []
    if answer.get("score") is not None:
        facts.append(f"score {number(answer['score'], 1)}")
    if answer.get("finish_reason") not in (None, "stop"):
        facts.append(f"cut: {answer['finish_reason']}")
    if None not in (orders := verdict.get("orders") or [None]):
        first, second = orders
        facts.append(f"share of the win {number(first)} shown first, {number(second)} shown second")
    reasons = [answer.get("reason") or ""]
    if verdict.get("reason") not in (None, *reasons):
        reasons.append(f"Verdict: {verdict['reason']}")
    return Answer(
        model=model,
        text=answer.get("text") or "",
        outcome=_outcome(verdict.get("verdict")),
        facts=tuple(facts),
        reasons=tuple(filter(None, reasons)),
    )


def _outcome(share: float | None) -> Literal["win", "tie", "loss"] | None:
    if share is None:
        return None
    return "win" if share > 0.5 else "loss" if share < 0.5 else "tie"
