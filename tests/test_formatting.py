"""Tests numbers and durations as people read them."""

import pytest

from zephyr_ray.formatting import (
    abbreviate,
    dollars,
    duration,
    hours,
    number,
    percent,
    rate_per_second,
    signed,
    significant,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.745, "0.75"), (0.445, "0.45"), (0.744, "0.74"), (1.005, "1.01"), (-0.125, "−0.13")],
)
def test_halves_are_rounded_away_from_zero(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 2, "–"),
        (1234567, 2, "1\u202f234\u202f567"),
        (1.0, 2, "1.00"),
        (18.25, 1, "18.3"),
        (-0.001, 2, "0.00"),
        (float("nan"), 2, "nan"),
        (1e30, 2, "1e+30"),
    ],
)
def test_number(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0125, "+0.013"), (-0.042, "−0.042"), (0.0, "+0.000"), (None, "–")]
)
def test_signed(value: float | None, text: str) -> None:
    assert signed(value) == text


@pytest.mark.parametrize(("share", "text"), [(0.145, "15%"), (0.783, "78%"), (1.0, "100%")])
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.69315, "0.693"),
        (0.02345, "0.0235"),  # below one half in binary
        (80.0, "80"),
        (12345.6, "12\u202f346"),
        (-0.0000123, "−1.23e-5"),
        (0.0, "0"),
        (float("nan"), "nan"),
    ],
)
def test_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.675, "$2.68"), (1234.5, "$1,234.50"), (0.00005, "$0.0001"), (0.0, "$0.00")],
)
def test_dollars(value: float, text: str) -> None:
    assert dollars(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.21, "3.2 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.5, "1 min 0 s"),
        (95, "1 min 35 s"),
        (3720, "1 h 2 min"),
        (None, "–"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(640, "640"), (64_000, "64,000"), (640_000, "0.64 M"), (285.4e6, "285 M")],
)
def test_abbreviated_counts(count: float, text: str) -> None:
    assert abbreviate(count) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0.4, "0.4"), (9.97, "10"), (24.83, "25"), (1000.0, "1,000")]
)
def test_rates_have_no_exponent(rate: float, text: str) -> None:
    assert rate_per_second(rate) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.55, "1.6 h"), (0.5, "30 min"), (1 / 60, "1 min"), (0.001, "< 1 min")]
)
def test_hours(value: float, text: str) -> None:
    assert hours(value) == text
