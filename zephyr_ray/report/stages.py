"""Reads manifests for the page's tables: counts, settings, and what was dropped."""

import json
from typing import Any

from zephyr_ray.formatting import describe_model
from zephyr_ray.store import Artifact

LONGEST_TEXT = 2000
TROUBLE = ("dropped", "failed", "truncated", "flips", "parse_failures", "unparsable", "over_long")
"""Prefixes of the counts that are listed as what failed and was dropped."""


def stage_row(name: str, artifact: Artifact) -> dict[str, Any]:
    """Collects what the page's tables show of one stage; any of it may be missing."""
    manifest = artifact.manifest
    counts, examples = manifest.counts, manifest.examples
    trouble = {k: v for k, v in counts.items() if k.startswith(TROUBLE)}
    return {
        "name": name,
        **{k: getattr(manifest, k) for k in ("kind", "key", "seconds", "attempts")},
        "created": manifest.created[:16].replace("T", " "),
        "settings": {k: _text(v) for k, v in manifest.settings.items()}
        | {f"model {n}": describe_model(spec) for n, spec in manifest.models.items()},
        "reads": manifest.reads,
        "rows": counts.get("rows"),
        "counts": {k: _whole(v) for k, v in counts.items() if k != "rows" and k not in trouble},
        "trouble": [
            {
                "what": what,
                "count": trouble.get(what),
                "examples": [shortened(_text(value)) for value in examples.get(what, [])],
            }
            for what in sorted({*trouble, *examples})
            if trouble.get(what) or examples.get(what)
        ],
    }


def shortened(text: str) -> str:
    """Cuts a text that is too long for the page, and says how much is missing."""
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]} … ({more} more characters)"


def _whole(value: float) -> float:
    """Makes a count that is written as 11.0 a whole number; shares of 0.0 and 1.0 stay."""
    return int(value) if float(value).is_integer() and not 0 <= value <= 1 else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
