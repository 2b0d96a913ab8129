"""Formats numbers, durations, sizes and models for people.

All displayed numbers are rounded by `rounded`, and only for display.
"""

import json
from collections.abc import Callable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from zephyr_ray.demand import GIB
from zephyr_ray.masking import masked

LARGEST = 1e15
"""Numbers of this size or more are written with an exponent."""


def rounded(value: float, digits: int, scale: int = 0) -> Decimal:
    """Returns `value` × 10^`scale`, rounded to `digits` decimals, halves away from zero, as the
    number is written in decimal: 0.745 becomes 0.75. Does not round numbers from LARGEST up."""
    # Goes through repr, because 0.745 in binary is less than 0.745 and would be rounded down.
    exact = Decimal(repr(value if isinstance(value, int) else float(value))).scaleb(scale)
    if not abs(value) < LARGEST:
        return exact
    return exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)


def number(value: float | None, digits: int = 2) -> str:
    """Formats whole numbers with thousands separators, others with `digits` decimals, None as
    "–"."""
    if value is None:
        return "–"
    if not abs(value) < LARGEST:
        return f"{value:.3g}"
    return _text(rounded(value, 0 if isinstance(value, int) else digits))


def significant(value: float, digits: int = 3) -> str:
    """Formats a number with `digits` significant digits, but keeps all before the decimal point:
    0.6931 as 0.693, 12.0 as 12, 0.0000123 as 1.23e-5."""
    if not 0 < abs(value) < LARGEST:
        return number(value, 0)
    exponent = Decimal(repr(float(value))).adjusted()
    short = rounded(value, max(0, digits - 1 - exponent)).normalize()
    return _text(short, ",f" if exponent >= -4 else "e")


def signed(value: float | None, digits: int = 3) -> str:
    """Formats a difference: like `number`, with a plus sign if it is not negative."""
    text = number(value, digits)
    return text if text.startswith(("–", "−")) else f"+{text}"


def with_interval(
    value: float, low: float, high: float, form: Callable[[float], str] = number
) -> str:
    """Formats a value with the ends of its interval: 0.62 [0.55, 0.69]."""
    return f"{form(value)} [{form(low)}, {form(high)}]"


def setting_value(value: Any) -> str:
    """Formats a value of a setting: text as it is, 1.0 as 1, 5e-07 as 5e-07, others as JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value).removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def percent(share: float) -> str:
    """Formats a fraction (0.25) as a whole percentage (25%)."""
    return f"{_text(rounded(share, 0, scale=2))}%"


def dollars(value: float) -> str:
    """Formats dollars: with cents from $1 up, with four decimals below."""
    if value >= 1 or not value:
        return f"${rounded(value, 2):,}"
    return f"${rounded(max(value, 0.0001), 4)}"


def duration(seconds: float | None) -> str:
    """Formats seconds in the two largest units: 3.2 s, 1 min 35 s, 1 h 2 min."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{number(float(seconds), 1)} s"
    whole = int(rounded(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shorten(text: str, limit: int = 300) -> str:
    """Returns the start of an untrusted text, on one line and without control characters."""
    # Mask before cutting, because part of a secret would not be recognized; cut before the loop,
    # because the text may be long.
    start = masked(text)[: 2 * limit]
    words = "".join(c if c.isprintable() else " " for c in start).split()
    line = " ".join(words)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def list_counts(counts: Mapping[str, float]) -> str:
    """Lists counts with the largest first: content filter 3, too long 2."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {int(count)}" for name, count in ordered)


def gib(size: float) -> str:
    """Formats bytes in GiB: two decimals below 1, one below 100, none above."""
    value = size / GIB
    return f"{number(value, 0 if value >= 99.5 else 1 if value >= 0.95 else 2)} GiB"


def abbreviate(count: float) -> str:
    """Formats a count in millions, or in full below 100,000."""
    if count < 1e5:
        return f"{rounded(count, 0):,}"
    millions = count / 1e6
    return f"{rounded(millions, 0):,} M" if count >= 1e7 else f"{significant(millions, 2)} M"


def rate_per_second(value: float) -> str:
    """Formats a throughput with two digits, or as a whole number from 10 up."""
    return f"{rounded(value, 0):,}" if value >= 9.95 else significant(value, 2)


def hours(value: float) -> str:
    """Formats hours, or minutes below one hour."""
    if value >= 1:
        return f"{rounded(value, 1)} h"
    return f"{rounded(value * 60, 0)} min" if value * 60 >= 1 else "< 1 min"


def describe_model(spec: dict[str, Any]) -> str:
    """Describes a model of a manifest on one line: what it is and how answers are sampled."""
    weights = Path(spec.get("weights") or "")
    trained = weights.name == "model"  # the folder of the artifact names the stage and its key
    parts = [weights.parent.name if trained else str(spec.get("weights") or "")]
    parts += [str(spec.get(k) or "") for k in ("engine", "model", "base_url")]
    if spec.get("relevance"):
        parts.append(f"on topic by {Path(spec['relevance']).name} ≥ {spec['relevance_min']}")
    if "temperature" in spec and (spec.get("weights") or spec.get("model")):
        parts.append(f"temperature {spec['temperature']}, top_p {spec['top_p']}")
    if spec.get("demonstrations"):
        parts.append("with worked examples")
    if spec.get("questions"):
        parts.append("with other questions")
    return masked(", ".join(part for part in parts if part))


def _text(value: Decimal, form: str = ",f") -> str:
    text = f"{abs(value):{form}}".replace(",", "\u202f")
    return f"−{text}" if value < 0 else text
