"""Tests the report's chapter on diversity against figures computed by hand."""

from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import assistant, user
from zephyr_ray.models import similarity
from zephyr_ray.models.similarity import diversity
from zephyr_ray.report import diversity_section as module
from zephyr_ray.report.diversity_section import diversity_section
from zephyr_ray.report.page import Report
from zephyr_ray.section import Table, Trend
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import Artifact, write_rows

Row = dict[str, Any]


class Texts(Stage):
    """A stage that makes an artifact of any type."""

    kind = "texts"
    makes: str  # type: ignore[misc]


def dialogue(*texts: str) -> Row:
    return {"messages": [assistant(t) if i % 2 else user(t) for i, t in enumerate(texts)]}


def chapter(folder: Path, **rows: list[Row]) -> tuple[list[Trend], Table]:
    """Returns plots and table for artifacts, each named after its type."""
    inputs = {}
    for name, artifact_rows in rows.items():
        (folder / name).mkdir()
        counts = {"rows": write_rows(folder / name, artifact_rows)}
        inputs[name] = Artifact(
            folder / name, Manifest(kind=name, key=name, files={}, counts=counts)
        )
    section = diversity_section({name: Texts(makes=name) for name in rows}, inputs)
    assert section
    [only] = section.chapters
    *plots, table = only.blocks
    assert isinstance(table, Table)
    return [plot for plot in plots if isinstance(plot, Trend)], table


def prompt(text: str) -> Row:
    return {"instruction": text, "prompt": f"{text} In one word."}


def values(trend: Trend) -> dict[str, list[float]]:
    assert all(v.low == v.value == v.high for _, points in trend.series for _, v in points)
    assert all([at for at, _ in pts] == [*range(1, len(pts) + 1)] for _, pts in trend.series)
    return {name: [value.value for _, value in points] for name, points in trend.series}


def test_diversity_by_turn_by_hand(tmp_path: Path) -> None:
    rows = [
        dialogue("red cat", "one two", "why is that", "yes yes"),
        dialogue("old dog", "six ten", "why is it", "yes yes"),
        dialogue("big sun", "red car"),  # Not plotted: it has no second turn.
    ]
    plots, table = chapter(tmp_path, dialogues=rows)
    pairs, nearest = plots
    # Distinct pairs of words in questions: 2 of 2, then 3 of 4 (why-is, is-that, is-it); in
    # answers: 2 of 2, then 1 of 2.
    assert values(pairs) == {"dialogues: questions": [1.0, 0.75], "dialogues: answers": [1.0, 0.5]}
    # "why is that" and "why is it" share 2 of 3 words in order: F = 2 / 3.
    assert values(nearest) == {
        "dialogues: questions": pytest.approx([0.0, 2 / 3]),
        "dialogues: answers": [0.0, 1.0],
    }
    assert (pairs.title, pairs.setting) == ("Distinct pairs of words", "turn")
    names = [row[:2] for row in table.rows]
    assert names == [("dialogues: questions", 5), ("dialogues: answers", 5)]


def test_turns_that_half_of_the_dialogues_reach_are_plotted(tmp_path: Path) -> None:
    rows = [dialogue(*"abcd"), dialogue(*"efghij")]
    plots, _ = chapter(tmp_path, dialogues=rows)
    assert len(values(plots[0])["dialogues: questions"]) == 3


def test_turns_that_few_dialogues_reach_are_left_out(tmp_path: Path) -> None:
    rows = [dialogue("a b", "c"), dialogue("d e", "f"), dialogue("g h", "i", "j k", "l")]
    assert chapter(tmp_path, dialogues=rows)[0] == []


def test_a_row_per_text_of_each_artifact(tmp_path: Path) -> None:
    sides = {name: [user("Q?"), assistant(name)] for name in ("chosen", "rejected")}
    _, table = chapter(
        tmp_path,
        prompts=[prompt("Name a cat."), prompt("Name a dog.")],
        completions=[{"completions": [{"text": "so it is"}, {"text": "so"}]}],
        pairs=[{"instruction": "Q?", **sides}],
        model=[{"anything": 1}],
        dialogues=[],
    )
    assert [row[0] for row in table.rows] == [
        *("prompts: instructions", "completions: answers"),
        *("pairs: prompts", "pairs: chosen", "pairs: rejected"),
    ]
    # Distinct: 4 of 6 words, 3 of 4 pairs of words. Shared in order: 2 of 3 words. One first word.
    assert table.rows[0][1:] == pytest.approx((2, 4 / 6, 0.75, 2 / 3, 2 / 3, 1.0, 0.0))


def test_rows_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLED", 3)
    texts = [f"w{number}" for number in range(8)]
    read: list[list[str]] = []
    monkeypatch.setattr(module, "diversity", lambda seen: read.append(seen) or {})
    chapter(tmp_path, prompts=[prompt(text) for text in texts])
    assert read == [["w0", "w3", "w6"]]


def test_the_report_has_the_chapter_and_its_plots(tmp_path: Path) -> None:
    for name in ("made", "page"):
        (tmp_path / name).mkdir()
    row = dialogue("red cat", "one two", "why is that", "yes yes")
    counts = {"rows": write_rows(tmp_path / "made", [row])}
    made = Artifact(tmp_path / "made", Manifest(kind="d", key="d", files={}, counts=counts))
    stages: dict[str, Stage] = {"made": Texts(makes="dialogues")}
    work = Work("report", tmp_path / "page", 0, {"made": made}, {}, {}, stages)
    Report(of=["made"]).run(work)
    html = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Diversity</h2>" in html and "made: questions" in html
    assert 'aria-label="Distinct pairs of words by turn: made: questions at 1: 1' in html


def test_diversity_compares_a_bounded_number_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a b c d", "x", "a b c e", "a b c d"]
    assert diversity(texts)["nearest_max"] == 1.0
    monkeypatch.setattr(similarity, "COMPARED", 2)  # The first and the third text.
    assert diversity(texts)["nearest_max"] == 0.75
    monkeypatch.setattr(similarity, "COMPARED_WORDS", 3)
    assert diversity(texts)["nearest_max"] == 1.0
    assert diversity(texts)["distinct_1"] == 6 / 13


@pytest.mark.parametrize("name", ["prompts", "dialogues"])
def test_without_rows_there_is_no_chapter(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    counts = {"rows": 0}
    empty = Artifact(tmp_path, Manifest(kind=name, key="k", files={}, counts=counts))
    assert diversity_section({"a": Texts(makes=name)}, {"a": empty}) is None
