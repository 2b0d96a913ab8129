"""Tests the diagram of the pipeline in the report: positions of boxes and lines, and links."""

import re
from itertools import pairwise

import pytest

from zephyr_ray.report.layout import Item, Layout, _rising, lay_out
from zephyr_ray.report.lineage import draw_pipeline
from zephyr_ray.report.summary import StageSummary

READS = {
    "heldout": [],
    "prompts": ["heldout"],
    "dialogues": ["prompts"],
    "clean": ["dialogues", "heldout"],
    "sft": ["clean"],
    "completions": ["sft", "prompts"],
    "pairs": ["completions"],
    "dpo": ["sft", "pairs"],
    "answers_base": ["heldout"],
    "answers_sft": ["sft", "heldout"],
    "answers_dpo": ["dpo", "heldout"],
    "winrate": ["answers_base", "answers_sft", "answers_dpo"],
}
BOX, LANE = 100.0, 10.0


def boxes(layout: Layout) -> dict[str, Item]:
    return {item.name: item for row in layout.rows for item in row if not item.is_lane}


@pytest.mark.parametrize("most", [1, 2, 6])
def test_boxes_are_below_their_sources_inside_and_do_not_overlap(most: int) -> None:
    layout = lay_out(READS, most, BOX, LANE)
    placed = boxes(layout)
    assert placed.keys() == READS.keys()
    for name, sources in READS.items():
        assert all(placed[source].row < placed[name].row for source in sources)
    for row in layout.rows:
        assert sum(not item.is_lane for item in row) <= most
        half = [(LANE if item.is_lane else BOX) / 2 for item in row]
        middles = [layout.middles[item] for item in row]
        assert middles[0] - half[0] >= -1e-6 and middles[-1] + half[-1] <= layout.width + 1e-6
        for (a, b), (x, y) in zip(pairwise(half), pairwise(middles), strict=True):
            assert y - x >= a + b - 1e-6


@pytest.mark.parametrize("most", [1, 2, 6])
def test_lines_lead_from_each_box_to_exactly_its_readers(most: int) -> None:
    layout = lay_out(READS, most, BOX, LANE)
    assert all(lower.row == upper.row + 1 for upper, lower in layout.lines)
    assert len(layout.lines) == len(set(layout.lines))
    reached: dict[str, set[str]] = {name: set() for name in READS}
    for upper, lower in layout.lines:
        if lower.is_lane:
            assert lower.name == upper.name
        else:
            reached[lower.name].add(upper.name)
    assert reached == {name: set(sources) for name, sources in READS.items()}


def test_a_box_is_one_row_above_its_first_reader() -> None:
    placed = boxes(lay_out(READS, 6, BOX, LANE))
    assert placed["winrate"].row == placed["answers_base"].row + 1 == placed["answers_dpo"].row + 1


def test_few_lines_cross() -> None:
    """In recipe order, the two lines would cross."""
    layout = lay_out({"a": [], "b": [], "of_b": ["b"], "of_a": ["a"]}, 6, BOX, LANE)
    upper, lower = ([item.name for item in row] for row in layout.rows)
    assert [f"of_{name}" for name in upper] == lower


def test_nearest_rising_values() -> None:
    def rising(*values: float) -> list[float]:
        return _rising([(value, 1) for value in values])

    assert rising(1, 3, 2, 4) == [1, 2.5, 2.5, 4]
    assert rising(3, 2, 1, 0, 5) == [1.5, 1.5, 1.5, 1.5, 5]
    assert _rising([(4, 1), (0, 3)]) == [1, 1]


def test_a_chain_of_boxes_is_a_column() -> None:
    layout = lay_out(READS, 6, BOX, LANE)
    placed = boxes(layout)
    chain = ("heldout", "prompts", "dialogues", "clean", "sft", "completions", "pairs")
    middles = [layout.middles[placed[name]] for name in chain]
    assert max(middles) - min(middles) < 3


def stage(name: str, seconds: float, paid: float, *reads: str) -> StageSummary:
    return StageSummary(
        name=name, kind="k", key="0", created="", seconds=seconds, attempts=1, rows=1200, paid=paid,
        reads=reads, settings={}, counts={}, trouble=(),
    )  # fmt: skip


def test_a_box_links_to_its_stage_and_says_time_rows_cost_and_sources() -> None:
    svg = draw_pipeline([stage("a", 30, 0), stage("b", 60, 0.25, "a", "elsewhere")], 6)
    links = re.findall(r'<a href="([^"]+)" aria-label="([^"]+)">', svg)
    assert links == [
        ("#stage-a", "a: k, 30 s, 1\u202f200 rows"),
        ("#stage-b", "b: k, 1 min 0 s, 1\u202f200 rows, $0.2500, made from a, elsewhere"),
    ]
    assert re.findall(r"--share: ([\d.]+)", svg) == ["0.50", "1.00"]
    assert svg.count("<path") == 1
    assert re.findall(r">([^<>]+)</text>", svg) == [
        *("a", "30 s · 1\u202f200 rows"),
        *("b", "1 min 0 s · 1\u202f200 rows", "$0.2500"),
    ]


def test_names_in_the_diagram_are_escaped() -> None:
    svg = draw_pipeline([stage('<script>"x"', 1, 0)], 6)
    assert "<script" not in svg and svg.count('"x"') == 0
