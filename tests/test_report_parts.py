"""Tests parts of the report page: verdict and facts, shaded cells, filters, scatter and radar."""

import base64
import hashlib
import re
from pathlib import Path

from test_report import make, page

from zephyr_ray.report.chapters import Filters, arrange
from zephyr_ray.report.plots import draw
from zephyr_ray.report.render import content_policy, shade
from zephyr_ray.report.summary import summarize_stages
from zephyr_ray.section import (
    Answer,
    Bars,
    Block,
    Chapter,
    Column,
    Interval,
    Place,
    Radar,
    Sample,
    Scatter,
    Section,
    Table,
)
from zephyr_ray.stage import Stage
from zephyr_ray.store import Artifact

JUDGE = {"engine": "openai", "model": "m-4", "weights": ""}
START = {"engine": "vllm", "weights": "/hub/small-model"}


class Says(Stage):
    """A stage with a given finding and table."""

    kind = "says"
    makes = "findings"
    trains_model = True

    finding: str = ""
    table: Table | None = None

    def section(self, artifact: Artifact) -> Section:
        blocks = (self.table,) if self.table else ()
        return Section((Chapter("Said", Place.RESULT, blocks),), self.finding)


def test_the_page_opens_with_the_last_finding_and_lists_the_others(tmp_path: Path) -> None:
    """The others are listed from last to first."""
    made = [make(tmp_path, name, "says") for name in ("first", "second", "silent", "last")]
    says = {"silent": Says()} | {
        name: Says(finding=text)
        for name, text in (("first", "One."), ("second", "Two."), ("last", "Three."))
    }
    html = page(tmp_path, *made, **says)
    assert re.findall(r'<p class="headline">(.*?)</p>', html) == ["Three."]
    assert re.findall(r'<ul class="findings">(.*?)</ul>', html) == [
        "<li><b>second</b>: Two.</li><li><b>first</b>: One.</li>"
    ]


def test_facts_below_the_verdict(tmp_path: Path) -> None:
    trained = make(tmp_path, "sft", "says", recipe="quick", seconds=90.0, models={"base": START})
    # It starts from another stage's model, which is no start model of the run.
    again = make(tmp_path, "dpo", "says", models={"sft": {"weights": "/store/sft-1/model"}})
    judged = make(
        tmp_path, "winrate", "says", recipe="quick", seconds=30.0, settings={"judge": "judge"},
        models={"judge": JUDGE},
        counts={"paid/judge/dollars": 1.0, "paid/judge/unknown_dollars": 0.5},
    )  # fmt: skip
    html = page(tmp_path, trained, again, judged, sft=Says(), dpo=Says(), winrate=Silent())
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts.pop("Date")[:2] == "20"
    assert facts == {
        "Recipe": "quick",
        "Models": "sft, dpo from small-model",
        "Judge": "openai, m-4",
        "Cost": "$1.50",
        "Time": "2 min 0 s, 3 stages",
    }


class Silent(Stage):
    kind = "silent"
    makes = "nothing"


def test_a_run_that_paid_nothing_says_so(tmp_path: Path) -> None:
    html = page(tmp_path, make(tmp_path, "seeds", "silent"), seeds=Silent())
    assert "<dt>Cost</dt><dd>nothing was paid</dd>" in html
    assert ", 1 stage</dd>" in html
    assert '<th scope="col" class="n">Cost</th>' not in html


def test_every_judge_is_named_once(tmp_path: Path) -> None:
    rules = {"engine": "rules"}
    made = [
        make(tmp_path, name, "silent", settings={"judge": "judge"}, models={"judge": judge})
        for name, judge in (("first", rules), ("second", JUDGE), ("third", JUDGE))
    ]
    html = page(tmp_path, *made, first=Silent(), second=Silent(), third=Silent())
    assert "<dt>Judge</dt><dd>rules; openai, m-4</dd>" in html


def test_an_endpoint_without_a_price_has_no_recorded_cost(tmp_path: Path) -> None:
    made = make(tmp_path, "winrate", "silent", models={"judge": JUDGE})
    html = page(tmp_path, made, winrate=Silent())
    assert "<dt>Cost</dt><dd>unknown for judge (no price set)</dd>" in html


def test_an_artifact_of_another_recipe_is_identified_by_its_key(tmp_path: Path) -> None:
    ours = make(tmp_path, "ours", "silent", key="a" * 16)
    reader = make(tmp_path, "reader", "silent", reads={"theirs": "a" * 16, "gone": "b" * 16})
    [_, summary] = summarize_stages({"ours": ours, "reader": reader})
    assert summary.reads == ("ours", "gone")


def test_intervals_and_numbers_are_shaded_by_their_value(tmp_path: Path) -> None:
    columns = (Column("Model"), *(Column(name, digits=2, shaded=True) for name in "abcd"))
    row = ("sft", 0.75, Interval(0.25, 0.1, 0.4), 3.0, None)
    html = page(tmp_path, make(tmp_path, "s", "says"), s=Says(table=Table(columns, (row,))))
    cells = re.findall(r'<td class="n shaded"( style="--share: [\d.]+")?>', html)
    assert [re.sub(r"[^\d.]", "", cell) for cell in cells] == ["0.75", "0.25", "1.00", ""]


def test_text_has_no_shade() -> None:
    assert shade("baseline") is None and shade((1, 2)) is None


def chapter(*samples: Sample, place: Place = Place.SAMPLES) -> dict[str, Section]:
    return {"s": Section((Chapter("Samples", place, samples),))}


WON = Sample("p", (Answer("base", "a"), Answer("sft", "b", "win")), "sports")
LOST = Sample("q", (Answer("base", "a"), Answer("dpo", "b", "loss")))


def test_filters_offer_the_values_that_samples_have() -> None:
    [merged] = arrange(chapter(WON, LOST), {})
    assert merged.filters == Filters(2, ["base", "sft", "dpo"], ["win", "loss"], ["sports"])


def test_examples_outside_of_samples_and_a_single_sample_have_no_filters() -> None:
    assert arrange(chapter(WON), {})[0].filters is None
    assert arrange(chapter(WON, LOST, place=Place.PROCESS), {})[0].filters is None


def test_two_chapters_of_a_stage_with_one_title_are_one() -> None:
    one = Chapter("Samples", Place.SAMPLES, (WON,))
    [merged] = arrange({"s": Section((one, one))}, {})
    assert merged.filters and merged.filters.samples == 2


def plot(block: Block, *names: str) -> str:
    [svg] = draw([block], "s", dict.fromkeys(names, "#4477aa"))
    return svg


def dots(svg: str) -> list[tuple[float, float]]:
    """Returns the coordinates of the dots, which are drawn as lines of length zero."""
    moves = re.findall(r"M ([\d.]+) ([\d.]+) +L \1 \2(?= )", svg)
    return [(float(x), float(y)) for x, y in moves]


def test_each_point_of_a_scatter_is_a_dot_at_its_place() -> None:
    points = tuple((float(n), 2.0 * n) for n in range(100))
    svg = plot(Scatter("Length", "words", "score", (("sft", points),)), "sft")
    assert 'aria-label="Length: sft 100 points, on average words 49.50 and score' in svg
    drawn = dots(svg)
    assert len(drawn) == 100
    (left, bottom), (right, top) = drawn[0], drawn[-1]
    for number, (x, y) in enumerate(drawn):
        assert abs(x - (left + (right - left) * number / 99)) < 0.11
        assert abs(y - (bottom + (top - bottom) * number / 99)) < 0.11
    assert "stroke-linecap: round" in svg


def test_a_title_beside_long_names_is_wrapped_to_fit_the_figure() -> None:
    title = "win_rules: Win rate against base at equal length"
    svg = plot(Bars(title, (("shown · fake2", Interval(0.5, 0.4, 0.6)),)), "shown · fake2")
    assert "win_rules: Win rate against base at<" in svg and ">equal length<" in svg


def test_a_series_without_points_is_drawn() -> None:
    svg = plot(Scatter("Length", "words", "score", (("a", ()), ("b", ((1.0, 2.0),)))), "a", "b")
    assert "a 0 points; b 1 points" in svg and len(dots(svg)) == 1


def test_a_radar_has_a_corner_per_known_value() -> None:
    def corners(*values: float | None) -> int:
        svg = plot(Radar("By category", ("a", "b", "c", "d"), (("sft", values),)), "sft")
        return len(re.findall(r"<use [^>]*stroke: #4477aa", svg))

    assert corners(0.1, 0.2, 0.3, 0.4) == 5  # the first again, to close the polygon
    assert corners(0.1, None, 0.3, 0.4) == 4


def test_a_radar_is_described() -> None:
    svg = plot(Radar("By category", ("a", "b"), (("sft", (0.25, None)),)), "sft")
    assert 'aria-label="By category: sft: a 0.25, b –"' in svg
    assert [name for name in "ab" if f">{name}</text>" in svg] == ["a", "b"]


def test_the_policy_allows_only_the_pages_own_script_and_no_request() -> None:
    digest = base64.b64encode(hashlib.sha256("alert('é')".encode()).digest()).decode()
    policy = dict(part.split(" ", 1) for part in content_policy("alert('é')").split("; "))
    assert policy.pop("script-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_bars_of_one_series_have_its_color() -> None:
    bar = Interval(0.5, 0.4, 0.6)
    block = Bars("Rate", (("a · one", bar), ("a · two", bar)), series=("one", "two"))
    [plot] = draw([block], "stage", {"one": "#112233", "two": "#445566"})
    assert "#112233" in plot and "#445566" in plot
