"""Tests the report's chapter on a sweep, from artifacts that have the stages' schemas."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import STAGES, headings, labels, make, words, write

from zephyr_ray.errors import Permanent
from zephyr_ray.report.page import Report
from zephyr_ray.report.plots import draw
from zephyr_ray.report.plots.figure import COLORS
from zephyr_ray.report.render import collect_findings
from zephyr_ray.report.sweep_section import sweep_section
from zephyr_ray.section import Bars, Chapter, Curve, Interval, Place, Section, Table, Trend
from zephyr_ray.stage import Variant, Work
from zephyr_ray.store import Artifact

RATES = {"dpo-beta-0.01": 0.62, "dpo-beta-0.1": 0.74, "dpo-beta-0.5": 0.7}
BETAS = {name: Variant("dpo", {"dpo.beta": float(name.split("-")[2])}) for name in RATES}


def training(root: Path, name: str, final: float) -> Artifact:
    """Returns a training of 30 steps whose last three losses average `final`."""
    losses = [2.0] * 27 + [final - 0.1, final + 0.2, final - 0.1]
    steps = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    return write(make(root, name, "dpo", settings={"beta": 0.1}), "metrics.jsonl", steps)


def pairwise(root: Path, rates: dict[str, float]) -> Artifact:
    """Returns a comparison with these win rates ± 0.05, and pass rates of half that ± 0.03."""
    models = {
        model: {
            **{"win_rate": rate, "low": rate - 0.05, "high": rate + 0.05},
            **{"pass_rate": rate / 2, "pass_low": rate / 2 - 0.03, "pass_high": rate / 2 + 0.03},
            "prompts": 200,
            **{"wins": 1, "ties": 0, "losses": 0, "flips": 0, "parse_failures": 0, "words": 9},
        }
        for model, rate in {"base": 0.5, "sft": 0.72, **rates}.items()
    }
    result = {"baseline": "base", "judge": "j", "control": None, "models": models}
    artifact = make(root, "winrate", "pairwise")
    (artifact.folder / "result.json").write_text(
        json.dumps(result | {"differences": [], "notes": []})
    )
    return write(artifact, "rows.jsonl", [])


def page(root: Path, variants: dict[str, Variant], *artifacts: Artifact, **settings: Any) -> str:
    inputs = {artifact.manifest.name: artifact for artifact in artifacts}
    stages = {name: STAGES[artifact.manifest.kind] for name, artifact in inputs.items()}
    work = Work("report", root / "report", 0, inputs, {}, {}, stages, variants)
    work.folder.mkdir()
    Report(of=list(inputs), title="swept", **settings).run(work)
    return (work.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("run")
    finals = dict(zip(RATES, (0.68, 0.55, 0.4), strict=True))
    trainings = [training(root, name, final) for name, final in finals.items()]
    return page(root, BETAS, *trainings, pairwise(root, RATES))


def sweep_rows(html: str) -> list[list[str]]:
    """Returns the cells of the chapter's table, without its header row."""
    chapter = html.partition('<section id="sweep">')[2].partition("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", chapter.partition("<tbody>")[2], re.DOTALL)
    return [[words(c).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", r, re.S)] for r in rows]


def test_the_page_opens_with_the_sweep(swept: str) -> None:
    assert headings(swept)[:3] == ["Sweep", "Result", "Training"]
    assert (
        '<p class="headline">dpo-beta-0.1 has the highest win rate against base of 3 variants, '
        "0.74 [0.69, 0.79], which may be chance: it is not clearly better than 1 of the 2 others."
    ) in swept


def test_a_row_per_variant_has_its_setting_outcomes_and_final_loss(swept: str) -> None:
    assert sweep_rows(swept) == [
        ["dpo-beta-0.01", "0.01", "0.62 [0.57, 0.67]", "0.31 [0.28, 0.34]", "0.680"],
        ["dpo-beta-0.1", "0.1", "0.74 [0.69, 0.79]", "0.37 [0.34, 0.40]", "0.550"],
        ["dpo-beta-0.5", "0.5", "0.70 [0.65, 0.75]", "0.35 [0.32, 0.38]", "0.400"],
    ]


def test_each_outcome_is_drawn_over_the_setting(swept: str) -> None:
    rates, passes, loss = labels(swept)[:3]
    assert rates == (
        "Win rate against base by dpo.beta: dpo at 0.01: 0.62 from 0.57 to 0.67; dpo at 0.1: 0.74 "
        "from 0.69 to 0.79; dpo at 0.5: 0.70 from 0.65 to 0.75"
    )
    assert passes.startswith("Checks passed by dpo.beta: dpo at 0.01: 0.31 from 0.28 to 0.34; dpo")
    assert loss == "Final loss by dpo.beta: dpo at 0.01: 0.68; dpo at 0.1: 0.55; dpo at 0.5: 0.4"


def test_axes_span_the_values(swept: str) -> None:
    chart = swept.partition('<section id="sweep">')[2].partition("</svg>")[0]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert texts[:4] == ["0.01", "0.1", "0.5", "dpo.beta"]
    rates = [float(text) for text in texts[4:] if re.fullmatch(r"[0-9.]+", text)]
    assert min(rates) <= 0.55 and 0.75 <= max(rates) <= 0.8


def draw_trend(*points: tuple[str | float, Interval]) -> str:
    return draw([Trend("Rate", "dpo.beta", (("dpo", points),))], "", {"dpo": COLORS[0]})[0]


def places(*settings: str | float) -> list[float]:
    """Returns each value's position on the axis, from 0 (the first value) to 1 (the last)."""
    svg = draw_trend(*((at, Interval(0.5, 0.4, 0.6)) for at in settings))
    x = [float(x) for x in re.findall(r'text-anchor: middle[^>]* x="([\d.]+)"', svg)]
    first, last = x[0], x[len(settings) - 1]
    return [(at - first) / (last - first) for at in x[: len(settings)]]


def test_intervals_are_drawn_from_end_to_end() -> None:
    """Otherwise the axis would end near the point estimates."""
    svg = draw_trend((1, Interval(0.5, 0.1, 0.7)), (2, Interval(0.6, 0.4, 0.9)))
    ticks = [float(text) for text in re.findall(r"text-anchor: end[^>]*>([\d.]+)<", svg)]
    assert min(ticks) <= 0.2 and max(ticks) >= 0.8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0, 2.0, 5.0), [0, 1 / 4, 1]),
        ((0.1, 1.0, 100.0), [0, 1 / 3, 1]),  # logarithmic
        ((0.0, 1.0, 100.0), [0, 1 / 100, 1]),  # zero has no logarithm
        (("random", "lowest", "all"), [0, 1 / 2, 1]),
        (("null", 0.5, 100.0), [0, 1 / 2, 1]),
    ],
)
def test_the_axis_suits_the_values(
    settings: tuple[str | float, ...], expected: list[float]
) -> None:
    assert places(*settings) == pytest.approx(expected, abs=0.005)


def test_long_names_of_bars_differ() -> None:
    rates = {
        f"dpo-learning_rate-{rate}-epochs-{n}": 0.5 for rate in ("5e-07", "5e-06") for n in (1, 2)
    }
    values = tuple((name, Interval(rate, 0.4, 0.6)) for name, rate in rates.items())
    svg = draw([Bars("Rate", values)], "", dict.fromkeys(rates, COLORS[0]))[0]
    assert len(set(re.findall(r">(dpo-[^<]+)<", svg))) == 4


def test_every_variant_is_named_in_bars_and_curves(swept: str) -> None:
    bars = [label for label in labels(swept) if label.startswith("Win rate against base: ")]
    for name in RATES:
        assert name in bars[0] and f"{name} · loss over 30 steps" in " ".join(labels(swept))
        assert f'<a href="#stage-{name}">{name}</a>' in swept and f'<tr id="stage-{name}">' in swept


def bars(rates: dict[str, float]) -> Section:
    values = tuple((name, Interval(rate, rate - 0.1, rate + 0.1)) for name, rate in rates.items())
    return Section((Chapter("Result", Place.RESULT, (Bars("Rate", values),)),))


def curve(*values: float) -> Section:
    points = tuple(enumerate(values, 1))
    return Section((Chapter("Training", Place.PROCESS, (Curve("loss", points),)),))


def blocks(section: Section | None, kind: type) -> list[Any]:
    assert section
    every: list[Any] = [block for chapter in section.chapters for block in chapter.blocks]
    return [block for block in every if isinstance(block, kind)]


def test_without_a_sweep_there_is_no_chapter() -> None:
    assert sweep_section({}, {"winrate": bars({"dpo": 0.7})}) is None
    unmeasured = {"pairs-rejected-all": Variant("pairs", {"pairs.rejected": "all"})}
    assert sweep_section(unmeasured, {"winrate": bars({"dpo": 0.7})}) is None


def test_two_settings_have_a_plot_each_with_a_series_per_other_value() -> None:
    variants = {
        f"dpo-{rejected}-{epochs}": Variant(
            "dpo", {"pairs.rejected": rejected, "dpo.epochs": float(epochs)}
        )
        for rejected in ("random", "all")
        for epochs in (1, 2)
    }
    rates = dict(zip(variants, (0.5, 0.6, 0.7, 0.8), strict=True))
    trends: list[Trend] = blocks(sweep_section(variants, {"winrate": bars(rates)}), Trend)
    drawn = {
        (trend.setting, name): [(at, value.value) for at, value in points]
        for trend in trends
        for name, points in trend.series
    }
    assert drawn == {
        ("pairs.rejected", "dpo, dpo.epochs 1"): [("random", 0.5), ("all", 0.7)],
        ("pairs.rejected", "dpo, dpo.epochs 2"): [("random", 0.6), ("all", 0.8)],
        ("dpo.epochs", "dpo, pairs.rejected random"): [(1.0, 0.5), (2.0, 0.6)],
        ("dpo.epochs", "dpo, pairs.rejected all"): [(1.0, 0.7), (2.0, 0.8)],
    }


def test_outcomes_of_one_swept_comparison_share_a_column() -> None:
    variants = {
        f"{stage}-{value}": Variant(stage, {"sft.epochs": value})
        for stage in ("dpo", "winrate")
        for value in (1, 2)
    }
    sections = {"winrate-1": bars({"dpo-1": 0.5}), "winrate-2": bars({"dpo-2": 0.6})}
    [table] = blocks(sweep_section(variants, sections), Table)
    assert [column.heading for column in table.columns] == ["Variant", "sft.epochs", "Rate"]
    assert [(row[0], row[2].value) for row in table.rows] == [("dpo-1", 0.5), ("dpo-2", 0.6)]


def test_the_same_outcome_of_two_stages_has_two_columns() -> None:
    variants = {
        f"{stage}-{value}": Variant(stage, {"sft.epochs": value})
        for stage in ("sft", "dpo")
        for value in (1, 2)
    }
    sections = {name: curve(3.0, float(number)) for number, name in enumerate(variants)}
    [table] = blocks(sweep_section(variants, sections), Table)
    headings = [column.heading for column in table.columns]
    assert headings == ["Variant", "sft.epochs", "Final loss (sft)", "Final loss (dpo)"]
    assert [row[2:] for row in table.rows] == [(0.0, None), (1.0, None), (None, 2.0), (None, 3.0)]


def test_a_clear_winner_is_not_called_chance() -> None:
    rates = dict(zip(BETAS, (0.1, 0.9, 0.2), strict=True))
    section = sweep_section(BETAS, {"winrate": bars(rates)})
    assert section
    assert section.headline == (
        "dpo-beta-0.1 has the highest rate of 3 variants, 0.90 [0.80, 1.00]; it is clearly "
        "better than every other."
    )


def test_the_headline_of_two_variants() -> None:
    section = sweep_section(BETAS, {"winrate": bars({"dpo-beta-0.1": 0.5, "dpo-beta-0.5": 0.55})})
    assert section
    assert section.headline == (
        "dpo-beta-0.5 has the highest rate of 2 variants, 0.55 [0.45, 0.65], which may be chance: "
        "it is not clearly better than the other."
    )


@pytest.mark.parametrize(("low", "says"), [(0.01, "clearly better than every"), (0.0, "chance")])
def test_a_paired_difference_decides_although_intervals_overlap(low: float, says: str) -> None:
    first, second, *_ = BETAS
    rates = {first: Interval(0.5, 0.4, 0.6), second: Interval(0.55, 0.45, 0.65)}
    difference = (second, first, Interval(0.05, low, 0.1))
    block = Bars("Rate", tuple(rates.items()), differences=(difference,))
    chapter = Chapter("Result", Place.RESULT, (block,))
    section = sweep_section(BETAS, {"winrate": Section((chapter,))})
    assert section and says in section.headline


def test_the_final_validation_is_an_outcome_too() -> None:
    def validated(last: float) -> Section:
        held_out = Curve("loss", ((1, 2.0), (2, 1.5)), validation=((1, 2.2), (2, last)))
        return Section((Chapter("Training", Place.PROCESS, (held_out,)),))

    sections = {name: validated(1.9 + n) for n, name in enumerate(BETAS)}
    [table] = blocks(sweep_section(BETAS, sections), Table)
    assert [column.heading for column in table.columns[2:]] == [
        *("Final loss", "Final validation loss"),
    ]
    assert [row[2:] for row in table.rows] == [(1.5, 1.9), (1.5, 2.9), (1.5, 3.9)]


def test_figures_of_a_released_model_are_set_beside_each_variant(tmp_path: Path) -> None:
    trainings = [training(tmp_path, name, 0.5) for name in BETAS]
    released = {"dpo": {"train/loss_final": 0.7496}}
    html = page(tmp_path, BETAS, *trainings, released=released)
    chapter = html.partition("<h2>Compared with released figures<")[2].partition("</section>")[0]
    assert re.findall('#stage-([^"]+)', chapter) == list(BETAS)


def test_findings_of_variants_are_in_the_order_of_the_sweep() -> None:
    """Findings of other stages are listed from the last stage to the first."""
    sections = {name: Section((), f"About {name}.") for name in ("sft", *BETAS, "winrate")}
    findings = collect_findings(sections, {name: variant.of for name, variant in BETAS.items()})
    assert [finding.name for finding in findings] == ["winrate", *BETAS, "sft"]


def test_a_released_model_needs_a_stage_of_the_report() -> None:
    for name in BETAS:
        Report(of=[name], released={"dpo": {}}).check({}, {})
    with pytest.raises(Permanent, match="the report is not about 'dp'"):
        Report(of=list(BETAS), released={"dp": {}}).check({}, {})
