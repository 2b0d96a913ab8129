"""Builds what a corrected comparison contributes to the report."""

import json
from collections.abc import Iterator
from typing import Any

from zephyr_ray.formatting import number, with_interval
from zephyr_ray.judge.correction import ENOUGH_LABELS
from zephyr_ray.judge.wording import direction
from zephyr_ray.section import Block, Chapter, Column, Interval, Place, Section, Table, Text
from zephyr_ray.store import Artifact

Result = dict[str, Any]
"""The content of result.json, or a part of it."""


def correction_section(artifact: Artifact) -> Section:
    """Returns the corrected rates, the judge's agreement with people, and their limits."""
    result = json.loads(artifact.file("result.json").read_text(encoding="utf-8"))
    left_out = {
        name.removeprefix("left_out/"): int(count)
        for name, count in artifact.manifest.counts.items()
        if name.startswith("left_out/") or name == "unparsable"
        if count
    }
    blocks: list[Block] = [Text(_intro(result), soft=True), _rates(result)]
    blocks += map(Text, [*_about_votes(result, left_out), *_about_models(result)])
    blocks.append(_agreement(result))
    chapter = Chapter("The judge, corrected by people", Place.RESULT, tuple(blocks))
    return Section((chapter,), _headline(result))


def _intro(result: Result) -> str:
    return (
        f"People compared answers on the chat page, and “{result['judge']}” judged the same "
        f"{result['votes']} pairs. Both corrections combine its verdicts on the held-out prompts "
        f"with what people chose; every model is compared with “{result['baseline']}”; brackets "
        "are 95% intervals. PPI++ uses the votes between the two models, and assumes that their "
        "prompts are like the held-out ones. The two-parameter correction uses all decided votes, "
        "including those between other models, and assumes that the judge agrees with people as "
        "often on the held-out prompts as on these."
    )


def _rates(result: Result) -> Table:
    rows = tuple(
        (
            model,
            _interval(figures["judge"], "win_rate"),
            _interval(figures["prediction_powered"]),
            (figures["prediction_powered"] or {}).get("weight"),
            figures["votes"],
            _interval(figures["two_parameter"]["corrected"]),
            figures["two_parameter"]["q1"],
            figures["two_parameter"]["q0"],
            figures["decided_votes"],
        )
        for model, figures in result["models"].items()
    )
    columns = (
        Column("Model"),
        Column("Judge alone", digits=2),
        Column("PPI++", digits=2),
        Column("λ", digits=2),
        Column("Votes", digits=0),
        Column("Two-parameter", digits=2),
        Column("q₁", digits=2),
        Column("q₀", digits=2),
        Column("Decided votes", digits=0),
    )
    help = (
        "λ: weight of the judge's verdicts in PPI++; with 0 the rate comes from the votes alone.",
        "q₁ and q₀: the judge's share for the answer that people preferred, where that is the "
        "model's and where it is the baseline's.",
    )
    return Table(columns, rows, f"Win rate against {result['baseline']}", help)


def _agreement(result: Result) -> Table:
    names = {
        "all": "All decided votes",
        "left": "Where people chose the left answer",
        "right": "Where people chose the right answer",
    }
    rows = tuple(
        (name, result["agreement"][side]["votes"], _interval(result["agreement"][side]))
        for side, name in names.items()
    )
    columns = (Column("Votes"), Column("Number", digits=0), Column("Agreement", digits=2))
    help = (
        "Agreement: the judge's share of the win for the answer that people chose; its ties count "
        "one half. Votes that are ties are left out.",
    )
    return Table(columns, rows, "Agreement of the judge with people", help)


def _about_votes(result: Result, left_out: dict[str, int]) -> Iterator[str]:
    """Yields limits of the votes themselves."""
    if result["ties"]:
        yield (
            f"Ties: {result['ties']} of {result['votes']} votes. Only PPI++ uses them; the "
            "two-parameter correction treats every held-out pair as one that people would decide."
        )
    if result["not_blind"]:
        yield (
            f"Not blind: {result['not_blind']} of {result['votes']} votes, whose voters may have "
            "known the models."
        )
    if left_out:
        causes = ", ".join(f"{cause} {count}" for cause, count in left_out.items())
        yield f"Votes left out because they have no verdict from the judge: {causes}."
    share = result["left_share"]
    if "rate" in share:
        findings = {
            1: "people favor the left side",
            0: "no side is favored beyond chance",
            -1: "people favor the right side",
        }
        finding = findings[direction(share["low"], share["high"], even=0.5)]
        yield (
            f"Share of the left answer in {_count(share['votes'])} that are blind and decided: "
            f"{_words(share)}; {finding}."
        )


def _about_models(result: Result) -> Iterator[str]:
    """Yields which corrections are missing or unreliable, and why."""
    baseline = result["baseline"]
    for model, figures in result["models"].items():
        votes, decided = figures["votes"], figures["decided_votes"]
        if figures["verdicts"] < 2:
            yield f"No correction for {model}: its comparison has fewer than two readable verdicts."
            continue
        if not figures["prediction_powered"]:
            yield (
                f"No PPI++ for {model}: it needs two votes between it and {baseline}, and there "
                f"are {votes}; let people compare these two models on the chat page."
            )
        elif votes < ENOUGH_LABELS:
            yield (
                f"Too few human labels: {votes} votes compare {model} with {baseline}; below "
                f"{ENOUGH_LABELS}, the interval of PPI++ is unreliable."
            )
        if not figures["two_parameter"]["corrected"]:
            yield f"No two-parameter correction for {model}: {_why(figures['two_parameter'])}."
        elif decided < ENOUGH_LABELS:
            yield (
                f"Too few human labels: {decided} decided votes; below {ENOUGH_LABELS}, the "
                f"interval of the two-parameter correction for {model} is unreliable."
            )


def _why(two_parameter: Result) -> str:
    q0, q1 = two_parameter["q0"], two_parameter["q1"]
    if q1 is None:
        return "people preferred its answer in no decided vote"
    if q0 is None:
        return "people preferred the other answer in no decided vote"
    return (
        f"q₀ + q₁ is {number(q0 + q1)}, not above 1 beyond chance; the verdicts say too little "
        "about what people prefer"
    )


def _headline(result: Result) -> str:
    """Says how the correction changes the win rate of the last model."""
    model, figures = list(result["models"].items())[-1]
    baseline, powered = result["baseline"], figures["prediction_powered"]
    alone = figures["judge"]
    judge = f"the judge alone says {_words(alone, 'win_rate')}" if figures["verdicts"] else ""
    if not powered:
        text = f"No human votes correct the win rate of {model} against {baseline}"
        return f"{text}; {judge}." if judge else f"{text}."
    text = (
        f"Corrected with {_count(figures['votes'])} of people (PPI++), {model} has a win rate of "
        f"{_words(powered)} against {baseline}; {judge}."
    )
    few = figures["votes"] < ENOUGH_LABELS
    return f"{text} Too few human labels: fewer than {ENOUGH_LABELS}." if few else text


def _interval(figures: Result | None, name: str = "rate") -> Interval | None:
    if not figures or figures.get(name) is None:
        return None
    return Interval(figures[name], figures["low"], figures["high"])


def _words(figures: Result, name: str = "rate") -> str:
    return with_interval(figures[name], figures["low"], figures["high"])


def _count(votes: int) -> str:
    return f"{votes} vote" if votes == 1 else f"{votes} votes"
