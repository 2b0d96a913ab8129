"""Builds the report's table of what paid models cost: each stage by the counts of its manifest, and
in one row per model what else the runs of the recipe spent."""

from collections.abc import Mapping

from zephyr_ray.engines.ledger import PAID, Spent
from zephyr_ray.manifest import Manifest
from zephyr_ray.section import Chapter, Column, Place, Section, Table

COLUMNS = (
    Column("Stage"),
    Column("Model"),
    Column("Requests", 0),
    Column("Input tokens", 0),
    Column("Cached input tokens", 0),
    Column("Output tokens", 0),
    Column("Dollars", 4),
    Column("Requests of unknown cost", 0),
    Column("Their maximum dollars", 4),
    Column("Requests sent again", 0),
)
NAMES = (
    *("requests", "input_tokens", "cached_tokens", "output_tokens", "dollars"),
    *("unknown_requests", "unknown_dollars", "repeated_requests"),
)
HELP = (
    "Token counts are those that the endpoint reported, for all attempts, including retries.",
    "The cost of a request is unknown if its reply did not arrive or did not state its tokens; its "
    "maximum cost is counted instead. Requests in flight when a process was killed were sent "
    "again, and may be paid for twice.",
)
OTHER = "other stages"
"""Name of the rows of other stages; no stage has it, because it contains a space."""
OTHER_HELP = (
    f"“{OTHER}”: what the recipe's runs spent on stages that are not in this report: unfinished "
    "ones, ones whose settings or inputs have changed since, and ones that it is not about."
)


def cost_section(manifests: Mapping[str, Manifest], others: Mapping[str, Spent]) -> Section | None:
    """Returns the chapter on the costs of the stages in the report, and of `others`, by model; None
    if they paid nothing."""
    rows: list[tuple[str, str, list[float]]] = []
    for stage, manifest in manifests.items():
        counts = {n.removeprefix(PAID): v for n, v in manifest.counts.items() if n.startswith(PAID)}
        for model in dict.fromkeys(name.rpartition("/")[0] for name in counts):
            figures = [counts.get(f"{model}/{name}", 0) for name in NAMES]
            if any(figures):
                rows.append((stage, model, figures))
    paid = {model: vars(spent) for model, spent in others.items() if spent != Spent()}
    rows += [(OTHER, model, [spent[name] for name in NAMES]) for model, spent in paid.items()]
    if not rows:
        return None
    if len(rows) > 1:
        columns = zip(*(figures for _, _, figures in rows), strict=True)
        rows.append(("all", "", [sum(column) for column in columns]))
    table = Table(
        COLUMNS,
        tuple((stage, model, *figures) for stage, model, figures in rows),
        help=(*HELP, OTHER_HELP) if paid else HELP,
    )
    return Section((Chapter("Cost of paid models", Place.PROCESS, (table,)),))
