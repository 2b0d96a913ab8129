"""Tests the comparison with released figures: their table, and the order of the models."""

from pathlib import Path

from zephyr_ray.manifest import Manifest
from zephyr_ray.report.released_section import released_chapter
from zephyr_ray.section import Bars, Chapter, Interval, Place, Section, Table, Text
from zephyr_ray.store import Artifact

OURS = {
    "org/base": Interval(0.50, 0.45, 0.55),
    "sft": Interval(0.70, 0.65, 0.75),
    "twice": Interval(0.74, 0.69, 0.79),
    "dpo": Interval(0.90, 0.85, 0.95),
}
RELEASED = {"win/dpo": 0.86, "win/sft": 0.85, "win/twice": 0.78, "win/org/base": 0.95, "loss": 0.7}


def blocks(*differences: tuple[str, str, Interval]) -> tuple[Table, Text]:
    counts = {"win/dpo": 0.9, "loss": 0.6}
    artifact = Artifact(Path(), Manifest(kind="pairwise", key="k", files={}, counts=counts))
    bars = Bars("Win rate", tuple(OURS.items()), figure="win", differences=differences)
    section = Section((Chapter("Result", Place.RESULT, (bars,)),))
    table, order = released_chapter(artifact, section, RELEASED).blocks
    assert isinstance(table, Table) and isinstance(order, Text)
    return table, order


def test_our_figures_have_their_intervals_beside_the_released_ones() -> None:
    assert blocks()[0].rows == (
        ("win/dpo", OURS["dpo"], 0.86),
        ("win/sft", OURS["sft"], 0.85),
        ("win/twice", OURS["twice"], 0.78),
        ("win/org/base", OURS["org/base"], 0.95),
        ("loss", 0.6, 0.7),
    )


def test_each_pair_of_models_has_the_released_order_the_opposite_or_neither() -> None:
    assert blocks()[1].text == (
        "win, released: org/base > dpo > sft > twice. The same order here: dpo above sft, dpo "
        "above twice. Not distinguished here: sft above twice. The opposite order here: org/base "
        "above dpo, org/base above sft, org/base above twice. Two models are not distinguished if "
        "intervals overlap."
    )


def test_paired_differences_take_precedence_over_intervals() -> None:
    """Here one decides although the intervals overlap; the other, given in reverse, includes 0
    although they do not."""
    order = blocks(
        ("sft", "twice", Interval(-0.04, -0.06, -0.02)),
        ("sft", "dpo", Interval(-0.2, -0.5, 0.1)),
    )[1].text
    assert "Not distinguished here: dpo above sft. " in order
    assert order.endswith(
        "The opposite order here: org/base above dpo, org/base above sft, org/base above twice, "
        "sft above twice. Two models are not distinguished if their difference in win may be 0."
    )
