"""Tests that numbers are rounded only in formatting.py, for display; ALLOWED has exceptions."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from zephyr_ray.judge.wording import headline
from zephyr_ray.report.plots import draw
from zephyr_ray.report.render import format_cell
from zephyr_ray.section import Bars, Column, Interval

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "zephyr_ray/formatting.py": "the rule",
    "zephyr_ray/models/gguf_conversion.py": "undoes the conversion of a setting to 32 bits",
    "zephyr_ray/report/lineage.py": "coordinates of a picture",
    "zephyr_ray/report/plots/figure.py": "coordinates of a picture",
    "zephyr_ray/serve/routing.py": "milliseconds in a log of JSON lines",
    "zephyr_ray/stage.py": "how many rows may fail",
    "zephyr_ray/text/feedback.py": "how many rows are rated again",
    "zephyr_ray/train/settings.py": "how many rows are held out",
}
PRECISION = re.compile(r"\.\d|[eEfF%]$")
"""A format specification that rounds. `:g` is not one, because settings have few digits."""
IN_TEXT = re.compile(r"%[-+ 0]*\d*\.\d+[efg]|\{[^{}]*:[^{}]*\.\d+[efg%]?\}")
"""A rounding conversion in a text for the % operator, logging or str.format."""


def roundings(source: str) -> Iterator[int]:
    """Yields the lines that round a number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FormattedValue) and node.format_spec:
            parts = node.format_spec.values  # type: ignore[attr-defined]
            spec = "".join(p.value if isinstance(p, ast.Constant) else "" for p in parts)
            is_time = "%" in spec[:-1]
            rounds = bool(PRECISION.search(spec)) and not is_time
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            rounds = name in {"round", "quantize", "around"}
        else:
            text = node.value if isinstance(node, ast.Constant) else None
            rounds = isinstance(text, str) and bool(IN_TEXT.search(text))
        if rounds:
            yield node.lineno  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "line",
    [
        *('f"{x:.2f}"', 'f"{x:,.0f}"', 'f"{x:.3g}"', 'f"{x:.1%}"', 'f"{x:e}"', 'f"{x:%}"'),
        *("round(x, 2)", "numpy.round(x)", 'log.info("%.2f s", x)', '"{:.2f}".format(x)'),
    ],
)
def test_a_rounding_is_detected(line: str) -> None:
    assert list(roundings(line)) == [1]


@pytest.mark.parametrize("line", ['f"{x:,}"', 'f"{x:>8}"', 'f"{x:g}"', 'f"{now:%H:%M:%S}"', "'5%'"])
def test_other_formats_are_not_roundings(line: str) -> None:
    assert list(roundings(line)) == []


def test_numbers_are_rounded_in_one_place() -> None:
    lines = {
        (str(path.relative_to(ROOT)), line)
        for path in (ROOT / "zephyr_ray").rglob("*.py")
        for line in roundings(path.read_text(encoding="utf-8"))
    }
    assert {place for place in lines if place[0] not in ALLOWED} == set()
    assert set(ALLOWED) == {path for path, _ in lines}


def test_headline_table_and_bar_agree() -> None:
    """As floats, 0.745 is slightly less than the decimal number, and 0.445 slightly more."""
    rate = Interval(0.745, 0.445, 0.785)
    figures = {"win_rate": 0.745, "low": 0.445, "high": 0.785, "prompts": 200, "words": 2.5}
    figures |= {"pass_rate": 0.745, "parse_failures": 0, "left_out": 0}
    models = {"base": {**figures, "pass_rate": 0.145}, "sft": figures}
    result = {"baseline": "base", "control": None, "models": models, "differences": []}
    sentence = headline(result)
    assert "win rate of 0.75 [0.45, 0.79]" in sentence
    assert "75% of sft's answers pass the checks (base: 15%), in 3 words" in sentence
    assert format_cell(rate, Column("Win rate", 2)) == "0.75 <small>[0.45, 0.79]</small>"
    [bar] = draw([Bars("Win rate", (("sft", rate),))], "winrate", {"sft": "#4477aa"})
    assert ">0.75</text>" in bar and "sft 0.75 from 0.45 to 0.79" in bar
