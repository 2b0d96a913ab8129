"""Builds the page that compares runs."""

from collections import Counter
from collections.abc import Sequence

from zephyr_ray.comparison.differences import Difference
from zephyr_ray.comparison.figures import compare_curves, compare_figures
from zephyr_ray.comparison.runs import Run, is_shared, stages_of
from zephyr_ray.engines.ledger import paid_dollars
from zephyr_ray.formatting import dollars, duration
from zephyr_ray.manifest import Manifest
from zephyr_ray.section import Chapter, Column, Place, Section, Table, Text

SAME, AGAIN, CHANGED, DERIVED = "same", "made again", "other settings", "other inputs"
"""States of a stage that all runs have."""
FIGURES = (
    "Figures can be compared only between runs with the same judge, prompts and baseline: see what "
    "differs. If two intervals do not overlap, the difference is unlikely to be chance; if they "
    "do, it may be."
)
"""Explanation of the figures."""
MOST_SETTINGS = 3
"""Maximum settings that the verdict names."""


def to_section(runs: Sequence[Run], differences: Sequence[Difference]) -> Section:
    """Returns the content of the page."""
    chapters = [
        Chapter("What differs", Place.OVERVIEW, (differences_table(runs, differences),)),
        Chapter("Figures", Place.RESULT, tuple(compare_figures(runs)), FIGURES),
        Chapter("Training", Place.PROCESS, tuple(compare_curves(runs))),
        Chapter("Stages", Place.PROCESS, (stages_table(runs, differences),)),
    ]
    return Section(tuple(chapter for chapter in chapters if chapter.blocks))


def verdict(runs: Sequence[Run], differences: Sequence[Difference]) -> str:
    """Says how much the runs share and what differs."""
    names = stages_of(runs)
    states = Counter(_state(runs, name, differences) for name in names)
    labels = f"{', '.join(run.label for run in runs[:-1])} and {runs[-1].label}"
    text = f"{labels} share {states[SAME]} of {len(names)} stages"
    if again := states[AGAIN]:
        text += f"; made separately from the same inputs: {again}"
    if not differences:
        return text + "; no setting differs."
    listed = [
        f"{d.setting} of {d.where} ({', '.join(v or '–' for v in d.values)})"
        for d in differences[:MOST_SETTINGS]
    ]
    more = len(differences) - len(listed)
    return f"{text}; they differ in {'; '.join(listed)}{f' and {more} more' if more else ''}."


def differences_table(runs: Sequence[Run], differences: Sequence[Difference]) -> Table | Text:
    if not differences:
        return Text("All settings of the stages that several runs have are the same.")
    columns = (Column("Stage or model"), Column("Setting"), *(Column(run.label) for run in runs))
    rows = tuple((d.where, d.setting, *(v or "–" for v in d.values)) for d in differences)
    return Table(columns, rows)


def stages_table(runs: Sequence[Run], differences: Sequence[Difference]) -> Table:
    """Returns a table of the stages: whether the runs share each, and its time and cost by run."""
    made = [[artifact.manifest for artifact in run.artifacts.values()] for run in runs]
    paid = any(paid_dollars(m.counts) for manifests in made for m in manifests)

    def cells(manifests: Sequence[Manifest]) -> tuple[str, ...]:
        time = duration(sum(m.seconds for m in manifests)) if manifests else "–"
        cost = sum(paid_dollars(m.counts) for m in manifests)
        return (time, dollars(cost) if cost else "") if paid else (time,)

    rows = []
    for name in stages_of(runs):
        own = [[run.artifacts[name].manifest] if name in run.artifacts else [] for run in runs]
        kinds = ", ".join(dict.fromkeys(m.kind for manifests in own for m in manifests))
        by_run = (cell for manifests in own for cell in cells(manifests))
        rows.append((name, kinds, _state(runs, name, differences), *by_run))
    rows.append(("Sum", "", "", *(cell for manifests in made for cell in cells(manifests))))
    headings = (f"{run.label}: {what}" for run in runs for what in ("time", "cost")[: 1 + paid])
    return Table(
        tuple(map(Column, ("Stage", "Kind", "Artifact", *headings))),
        tuple(rows),
        help=(
            f"“{AGAIN}”: from the same inputs, but training and generation are not deterministic.",
            "A stage that was reused counts the time and the cost of the run that made it.",
        ),
    )


def _state(runs: Sequence[Run], name: str, differences: Sequence[Difference]) -> str:
    """Says whether the runs have the same artifact of a stage."""
    having = [run for run in runs if name in run.artifacts]
    if len(having) < len(runs):
        return f"only in {', '.join(run.label for run in having)}"
    artifacts = [run.artifacts[name] for run in runs]
    if len({artifact.key for artifact in artifacts}) == 1:
        return SAME if is_shared(artifacts) else AGAIN
    return CHANGED if any(name in d.names for d in differences) else DERIVED
