"""Summarizes each stage for the page: what it was made from, what it cost, and what went wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zephyr_ray.engines.ledger import PAID, paid_dollars
from zephyr_ray.formatting import describe_model
from zephyr_ray.manifest import Manifest
from zephyr_ray.store import Artifact

LONGEST_TEXT = 2000
"""Maximum characters of a text on the page."""
TROUBLE = (
    *("dropped", "failed", "truncated", "flips", "parse_failures", "unparsable", "over_long"),
    *("empty", "both_empty", "short_of_count", "too long", "missing"),
)
"""Prefixes of counts that the page lists with failed and dropped rows."""


@dataclass(frozen=True)
class Trouble:
    """Rows that were dropped, failed or changed for one reason."""

    what: str
    count: float | None
    examples: tuple[str, ...]


@dataclass(frozen=True)
class StageSummary:
    """Facts about one stage that the page shows; any value may be missing."""

    name: str
    kind: str
    key: str
    created: str
    seconds: float
    attempts: int
    rows: float | None
    paid: float
    """Upper bound on the dollars that the stage paid."""
    reads: tuple[str, ...]
    """Stages that it was made from."""
    settings: dict[str, str]
    counts: dict[str, float]
    trouble: tuple[Trouble, ...]


def summarize_stages(inputs: Mapping[str, Artifact]) -> list[StageSummary]:
    """Returns the summaries of all stages, in their order."""
    # A reused artifact may have been made by a recipe with other names, so the key decides.
    names = {artifact.key: name for name, artifact in inputs.items()}
    keys = {name: artifact.key for name, artifact in inputs.items()}
    return [
        _summarize(
            name,
            artifact.manifest,
            tuple(
                source if keys.get(source) == key else names.get(key, source)
                for source, key in artifact.manifest.reads.items()
            ),
        )
        for name, artifact in inputs.items()
    ]


def _summarize(name: str, manifest: Manifest, reads: tuple[str, ...]) -> StageSummary:
    counts, examples = manifest.counts, manifest.examples
    trouble = {
        k: v
        for k, v in counts.items()
        if k in examples or k.removeprefix("validation/").startswith(TROUBLE)
    }
    return StageSummary(
        name=name,
        kind=manifest.kind,
        key=manifest.key,
        created=manifest.created[:16].replace("T", " "),
        seconds=manifest.seconds,
        attempts=manifest.attempts,
        rows=counts.get("rows"),
        paid=paid_dollars(counts),
        reads=reads,
        settings={k: _text(v) for k, v in manifest.settings.items()}
        | {f"model {n}": describe_model(spec) for n, spec in manifest.models.items()},
        counts={
            k: _whole(v)
            for k, v in counts.items()
            if k != "rows" and k not in trouble and not k.startswith(PAID)
        },
        trouble=tuple(
            Trouble(
                what,
                trouble.get(what),
                tuple(truncate_text(_example(value)) for value in examples.get(what, [])),
            )
            for what in sorted({*trouble, *examples})
            if trouble.get(what) or examples.get(what)
        ),
    )


def truncate_text(text: str) -> str:
    """Truncates a text that is too long, and states how many characters are missing."""
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]} … ({more} more characters)"


def _whole(value: float) -> float:
    """Converts a count such as 11.0 to an integer; leaves 0.0 and 1.0, which may be shares."""
    return int(value) if float(value).is_integer() and not 0 <= value <= 1 else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _example(value: Any) -> str:
    """Returns an example as text: a line per entry if it has names, such as prompt and answer."""
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(part)}" for name, part in value.items())
    return _text(value)
