"""Builds what finished likelihood stages contribute to the report."""

import json
from functools import partial
from typing import Any

from zephyr_ray.formatting import number, signed, with_interval
from zephyr_ray.judge.wording import certainty, direction, few_questions
from zephyr_ray.section import (
    Bars,
    Block,
    Chapter,
    Column,
    Interval,
    Pair,
    Place,
    Section,
    Table,
    Text,
)
from zephyr_ray.store import Artifact

Result = dict[str, Any]
"""The content of result.json."""

INTRO = (
    "The choice with the highest likelihood counts as the answer (acc); acc_norm divides the "
    "log-probability by the choice's length in characters; TruthfulQA's mc2 is the normalized "
    "total probability of the true choices. lm-eval {lm_eval} builds the prompts, without a chat "
    "template, and computes the metrics. Intervals (95%) are by bootstrap over questions."
)
AVERAGE = "mean over tasks"
FINDINGS = {
    1: "training gains accuracy",
    0: "no change can be shown, because the interval includes 0",
    -1: "training costs accuracy",
}
"""Wording of a difference in accuracy, by `direction`."""


def likelihood_section(artifact: Artifact) -> Section:
    """Returns the figures of all models and tasks, and the alignment tax."""
    result = json.loads(artifact.file("result.json").read_text(encoding="utf-8"))
    blocks: list[Block] = [
        Text(INTRO.format(lm_eval=result["lm_eval"]), soft=True),
        *_bars(result),
        _values(result),
        *_tax(result),
        *_remarks(result, artifact.manifest.counts),
    ]
    chapter = Chapter("Multiple choice by likelihood", Place.RESULT, tuple(blocks))
    return Section((chapter,), headline(result))


def headline(result: Result) -> str:
    """Says what the last model gained or lost relative to the first; for a single model, its value
    per task."""
    averages = [t for t in result["tax"] if t["task"] is None]
    tasks = result["tasks"]
    few = few_questions(min(facts["questions"] for facts in tasks.values()))
    if averages:
        last = averages[-1]
        amount = with_interval(last["difference"], last["low"], last["high"], signed)
        finding = FINDINGS[direction(last["low"], last["high"])]
        return (
            f"Accuracy of {last['after']} minus that of {last['before']} (the alignment tax, if "
            f"negative): {amount} ({'mean of ' if len(tasks) > 1 else ''}{', '.join(tasks)}): "
            f"{finding}.{few}"
        )
    model = result["models"][0]
    values = (
        f"{task} {_format_value(result['results'][task][facts['metric']][model])} on "
        f"{number(facts['questions'])} questions"
        for task, facts in tasks.items()
    )
    return f"Multiple choice by likelihood, {model}: {', '.join(values)}.{few}"


def _format_value(value: dict[str, Any]) -> str:
    return with_interval(value["value"], value["low"], value["high"], partial(number, digits=3))


def _bars(result: Result) -> list[Bars]:
    bars = []
    for task, facts in result["tasks"].items():
        values = result["results"][task][facts["metric"]]
        rows = tuple((model, _interval(value)) for model, value in values.items())
        figure = f"likelihood/{task}/{facts['metric']}"
        bars.append(Bars(f"{task}, {facts['metric']}", rows, figure=figure))
    return bars


def _values(result: Result) -> Table:
    models = result["models"]
    rows = []
    for task, facts in result["tasks"].items():
        for metric, values in result["results"][task].items():
            cells: list[Any] = []
            for model in models:
                cells += [_interval(values[model]), values[model]["stderr"]]
            rows.append((f"{task}, {metric}", facts["questions"], facts["shots"], *cells))
    columns = [Column("Task, metric"), Column("Questions", 0), Column("Shots", 0)]
    for model in models:
        columns += [Column(model, 3), Column(f"{model}, stderr", 4)]
    help = (
        "Shots: few-shot examples per question.",
        "stderr: lm-eval's standard error of the value to its left.",
    )
    return Table(tuple(columns), tuple(rows), help=help)


def _tax(result: Result) -> list[Table]:
    if not result["tax"]:
        return []
    several = len(result["tasks"]) > 1
    rows = tuple(
        (
            Pair(t["after"], t["before"]),
            t["task"] or AVERAGE,
            Interval(t["difference"], t["low"], t["high"]),
            t.get("changed"),
            certainty(t),
        )
        for t in result["tax"]
        if t["task"] or several
    )
    columns = (
        Column("Models"),
        Column("Task"),
        Column("Difference", 3, signed=True),
        Column("Changed", 0),
        Column("Interval"),
    )
    help = (
        "Difference: the metric after training minus the metric before it, over the same "
        "questions; the metric is the one that the bars show.",
        "Changed: questions whose metric differs between the two models.",
    )
    return [
        Table(
            columns, rows, "Differences from the first model (the alignment tax, if negative)", help
        )
    ]


def _remarks(result: Result, counts: dict[str, float]) -> list[Text]:
    """Returns how the questions and examples differ from a standard run."""
    remarks = []
    for task, facts in result["tasks"].items():
        if facts["questions"] < facts["of"]:
            remarks.append(f"{task}: {facts['questions']} of {facts['of']} questions.")
        if facts["shots"] and facts["shots_from"] not in ("train", "dev"):
            remarks.append(
                f"{task}: few-shot examples are from the {facts['shots_from']} split, because the "
                "source has no training split."
            )
        prefix = f"shortened/{task}/"
        for name, count in counts.items():
            if name.startswith(prefix):
                questions = "1 question" if count == 1 else f"{int(count)} questions"
                remarks.append(
                    f"{task}, {name.removeprefix(prefix)}: {questions} had prompts that exceeded "
                    "the context and were truncated at the start."
                )
    return [Text(" ".join(remarks), soft=True)] if remarks else []


def _interval(value: dict[str, Any]) -> Interval:
    return Interval(value["value"], value["low"], value["high"])
