"""Tests the report page in a real browser.

Skipped without Chromium (`apt-get install chromium`).
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from chrome import Chrome
from test_report import EVIL, feedback, make, page, pairwise, training

from zephyr_ray.section import (
    Answer,
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
    Text,
)
from zephyr_ray.stage import Stage
from zephyr_ray.store import Artifact

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")

MODELS = ("base", "sft", "dpo")
OUTCOMES: list[tuple[Any, Any]] = [("win", "win"), ("win", "loss"), ("loss", "tie"), ("tie", "win")]
"""Outcomes of sft and dpo by sample."""
KIND = " birds  of prey "
"""A kind with spaces that a browser collapses."""
PHONE, SCREEN = 390, 1200


class Everything(Stage):
    """A stage with samples, a wide matrix, and plots with long names."""

    kind = "everything"
    makes = "findings"

    def section(self, artifact: Artifact) -> Section:
        names = [f"model-with-a-long-name-{n}" for n in range(9)]
        cell = Interval(0.9, 0.85, 0.95)
        columns = (Column("Model"), *(Column(name, digits=2, shaded=True) for name in names))
        blocks: tuple[Block, ...] = (
            Text("A finding."),
            Table(columns, tuple((name, *[cell] * len(names)) for name in names), "Matrix"),
            Radar("By category", tuple(names), (("sft", tuple(n / 9 for n in range(9))),)),
            Scatter("Length", "words", "score", (("sft", ((1.0, 2.0), (3.0, 1.0))),)),
        )
        samples = tuple(
            Sample(
                f"Question {n} about {topic} {EVIL}",
                (
                    Answer("base", f"base says {n}"),
                    Answer("sft", f"sft says {n}", sft, reasons=("First: A. Second: A.",)),
                    Answer("dpo", "x" * 300, dpo, facts=("score 3",), reasons=("y" * 300,)),
                ),
                topic,
            )
            for n, ((sft, dpo), topic) in enumerate(zip(OUTCOMES, 2 * (KIND, "fish"), strict=True))
        )
        chapters = (
            Chapter("Result", Place.RESULT, blocks),
            Chapter("4 samples", Place.SAMPLES, samples),
        )
        return Section(chapters, "sft wins 0.77 [0.72, 0.83] of its comparisons.")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("run")
    made = [
        feedback(root),
        training(root, "sft", "sft"),
        training(root, "dpo", "dpo"),
        pairwise(root),
        make(root, "all", "everything", seconds=12.0, reads={"dpo": "3".zfill(16)}),
    ]
    page(root, *made, all=Everything())
    return f"file://{root}/report/report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with Chrome() as browser:
        yield browser


@pytest.fixture
def opened(browser: Chrome, address: str) -> Chrome:
    browser.emulate(width=SCREEN)
    browser.open("data:text/html,")
    browser.requests.clear()
    browser.problems.clear()
    browser.open(address)
    return browser


def samples(browser: Chrome) -> list[int]:
    """Returns the numbers of the visible samples of `Everything`."""
    visible = (
        "[...document.querySelectorAll('[id=\"4-samples\"] .sample')].map((s, n) => "
        "s.offsetHeight ? n : -1).filter(n => n >= 0)"
    )
    return list(browser.eval(visible))


def models(browser: Chrome) -> list[str]:
    """Returns the models whose answers are visible in the second sample."""
    visible = (
        "[...[...document.querySelectorAll('[id=\"4-samples\"] .sample')][1]"
        ".querySelectorAll('.answer')].filter(a => a.offsetHeight).map(a => a.dataset.model)"
    )
    return list(browser.eval(visible))


def tab_to(browser: Chrome, selector: str) -> None:
    """Presses Tab until an element has the focus."""
    for _ in range(100):
        if browser.eval(f"document.activeElement.matches('{selector}')"):
            return
        browser.press("Tab")
    raise AssertionError(f"{selector} cannot be reached by Tab")


def shown(browser: Chrome) -> str:
    return browser.text("[id='4-samples'] output")


def test_opening_the_page_requests_nothing_else(opened: Chrome, address: str) -> None:
    assert [url for url in opened.requests if url != address and url != "about:srcdoc"] == []
    assert opened.problems == []
    assert opened.eval("typeof window.hacked") == "undefined"


def test_a_foreign_script_does_not_run_and_no_request_leaves(opened: Chrome) -> None:
    opened.eval(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.hacked = 1'})), null"
    )
    assert opened.eval("typeof window.hacked") == "undefined"
    assert opened.eval("fetch('data:,x').then(() => 'sent', () => 'refused')") == "refused"


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_nothing_is_wider_than_the_window(opened: Chrome, width: int) -> None:
    opened.emulate(width=width)
    assert opened.eval("document.documentElement.scrollWidth") <= width
    # Only elements with their own scroll bars may be wider.
    wide = (
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .skip, svg') && "
        f"e.getBoundingClientRect().right > {width}).map(e => e.outerHTML.slice(0, 80))"
    )
    assert opened.eval(wide) == []


def test_the_picture_of_the_pipeline_fits_a_phone(opened: Chrome) -> None:
    opened.emulate(width=PHONE)
    visible = (
        "[...document.querySelectorAll('.pipeline')].map(p => p.getBoundingClientRect())"
        ".filter(b => b.width).map(b => b.right)"
    )
    [right] = opened.eval(visible)
    assert right <= PHONE


CONTRASTS = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = (top, bottom) => {
    const alpha = top[3] ?? 1;
    return [0, 1, 2].map((i) => top[i] * alpha + bottom[i] * (1 - alpha));
  };
  const background = (node) => {
    if (!node) return [255, 255, 255];
    return over(parse(getComputedStyle(node).backgroundColor), background(node.parentElement));
  };
  const light = (color) => {
    const [r, g, b] = color.map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((m, n) => n - m);
    return (x + 0.05) / (y + 0.05);
  };
  const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('script, .skip') || !e.getClientRects().length || !hasText(e)) continue;
    const svg = e.closest('svg');
    let behind = background(svg ? svg.parentElement : e);
    const rect = e.parentElement.querySelector(':scope > rect');
    if (svg && rect) behind = over(parse(getComputedStyle(rect).fill), behind);
    const ink = parse(getComputedStyle(e)[svg ? 'fill' : 'color']);
    const value = contrast(over(ink, behind), behind);
    if (value < 4.5) low.push(`${value.toFixed(2)}: ${e.outerHTML.slice(0, 90)}`);
  }
  return [...new Set(low)];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_is_legible(opened: Chrome, dark: bool) -> None:
    opened.emulate(width=SCREEN, dark=dark)
    assert opened.eval(CONTRASTS) == []


def test_dark_mode_applies(opened: Chrome) -> None:
    def paper_and_ink() -> list[int]:
        style = "getComputedStyle(document.body)"
        colors = opened.eval(f"[{style}.backgroundColor, {style}.color]")
        return [int(color.partition("(")[2].partition(",")[0]) for color in colors]

    paper, ink = paper_and_ink()
    assert paper > 240 and ink < 60
    opened.emulate(width=SCREEN, dark=True)
    paper, ink = paper_and_ink()
    assert paper < 60 and ink > 200


def test_samples_are_filtered_with_the_keyboard_alone(opened: Chrome) -> None:
    assert samples(opened) == [0, 1, 2, 3] and models(opened) == list(MODELS)
    tab_to(opened, '[id="4-samples"] select[name=model]')
    opened.press("ArrowDown")
    opened.press("ArrowDown")
    assert models(opened) == ["base", "sft"] and samples(opened) == [0, 1, 2, 3]
    tab_to(opened, "select[name=outcome]")
    opened.press("ArrowDown")
    assert samples(opened) == [0, 1] and shown(opened) == "2 of 4 samples"
    tab_to(opened, "select[name=kind]")
    opened.press("ArrowDown")
    assert samples(opened) == [0] and shown(opened) == "1 of 4 samples"
    tab_to(opened, ".filters button")
    opened.press("Enter")
    assert samples(opened) == [0, 1, 2, 3] and models(opened) == list(MODELS)
    assert opened.eval("document.activeElement.name") == "words"


def test_samples_are_searched_in_prompts_and_shown_answers(opened: Chrome) -> None:
    tab_to(opened, '[id="4-samples"] input[type=search]')
    opened.command("Input.insertText", text="QUESTION 2")
    assert samples(opened) == [2] and shown(opened) == "1 of 4 samples"
    opened.type("[id='4-samples'] input", "sft says 3")
    assert samples(opened) == [3]
    opened.type("[id='4-samples'] input", "no such words")
    assert samples(opened) == [] and shown(opened) == "0 of 4 samples"
    opened.press("Enter")
    assert opened.eval("location.search") == ""


def test_changes_of_the_number_of_samples_are_announced(opened: Chrome) -> None:
    tree = opened.command("Accessibility.getFullAXTree")["nodes"]
    roles = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree}
    assert {role for role, _ in roles} >= {"status", "search", "navigation", "main"}
    controls = {name for role, name in roles if role in ("combobox", "searchbox", "button")}
    assert controls == {"Search", "Model", "Outcome", "Kind", "Show all"}


def test_without_scripts_all_samples_are_shown(browser: Chrome, address: str) -> None:
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(address)
        assert browser.eval("document.querySelectorAll('.filters:not([hidden])').length") == 0
        assert samples(browser) == [0, 1, 2, 3]
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)


def test_a_box_leads_to_its_stage_and_its_settings(opened: Chrome) -> None:
    opened.eval("document.querySelector('.wide a[href=\"#stage-dpo\"]').focus()")
    opened.press("Enter")
    assert opened.eval("document.querySelector('tr:target').id") == "stage-dpo"
    inside = "(b => b.top >= 0 && b.bottom <= innerHeight)"
    assert opened.eval(f"{inside}(document.querySelector('tr:target').getBoundingClientRect())")
    opened.press("Tab")
    opened.press("Enter")
    assert opened.eval("location.hash") == "#settings-dpo"
    opened.wait("document.querySelector('#settings-dpo').closest('details').open")


def test_the_first_tab_skips_to_the_results(opened: Chrome) -> None:
    opened.press("Tab")
    assert opened.eval("document.activeElement.className") == "skip"
    opened.press("Enter")
    assert opened.eval("document.activeElement.id") == "main"


def test_the_verdict_is_on_the_first_screen_of_a_phone(opened: Chrome) -> None:
    opened.emulate(width=PHONE, height=844)
    opened.eval("scrollTo(0, 0)")
    bottom = "document.querySelector('.facts').getBoundingClientRect().bottom"
    assert opened.eval("document.querySelector('.headline').innerText").startswith("sft wins 0.77")
    assert opened.eval(bottom) <= 844
