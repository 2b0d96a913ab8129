"""Defines the report: one self-contained HTML page about a run."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

from zephyr_ray import __version__
from zephyr_ray.engines import ENGINES
from zephyr_ray.engines.ledger import PAID, Spent, spent_besides
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import describe_model, dollars, duration
from zephyr_ray.manifest import Manifest
from zephyr_ray.report.chapters import arrange
from zephyr_ray.report.cost_section import cost_section
from zephyr_ray.report.diversity_section import diversity_section
from zephyr_ray.report.released_section import released_chapter
from zephyr_ray.report.render import Fact, collect_findings, render
from zephyr_ray.report.summary import StageSummary, summarize_stages
from zephyr_ray.report.sweep_section import sweep_section
from zephyr_ray.section import Section
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import Stage, Work, original_name
from zephyr_ray.store import Artifact

MOST_NAMES = 6
"""Maximum models that the page names below its verdict."""


class Report(Stage):
    """Reports on other stages in one page, `report.html`."""

    kind = "report"
    makes = "report"
    view = ("report.html", "report.html")
    reads_lineage = True

    of: Annotated[list[str], Reads("any")]
    """The stages to report on; those they depend on are included."""
    title: str = "Zephyr"
    released: Annotated[dict[str, dict[str, float]], ADDED] = {}
    """Figures of a released model to show beside this run's, by stage and name of its count."""

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        for name in self.released:
            # The name of a sweep's variant begins with that of its stage.
            if not any(stage == name or stage.startswith(f"{name}-") for stage in self.of):
                raise Permanent(
                    f"released: the report is not about '{name}'; write a stage that `of` lists"
                )

    def run(self, work: Work) -> None:
        work.progress.unit = "page"
        originals = {name: original_name(name, work.variants) for name in work.inputs}
        contributed: dict[str, Section] = {}
        for name, artifact in work.inputs.items():
            section = work.stages[name].section(artifact)
            if figures := self.released.get(originals[name]):
                section = section or Section(())
                chapter = released_chapter(artifact, section, figures)
                section = replace(section, chapters=(*section.chapters, chapter))
            if section:
                contributed[name] = section
        others, distinct = _spent_on_others(work), _distinct(work.inputs)
        # Added last, because the page opens with the last headline. No stage has an empty name.
        about_the_run = [
            sweep_section(work.variants, contributed),
            diversity_section(work.stages, work.inputs),
            cost_section({name: a.manifest for name, a in distinct.items()}, others),
        ]
        if sections := [section for section in about_the_run if section]:
            chapters = tuple(chapter for section in sections for chapter in section.chapters)
            contributed[""] = Section(chapters, sections[0].headline)
        stages = summarize_stages(work.inputs)
        page = render(
            title=self.title,
            findings=collect_findings(contributed, originals),
            facts=collect_facts(work, stages, sum(spent.max_dollars for spent in others.values())),
            stages=stages,
            chapters=arrange(contributed, originals),
        )
        (work.folder / "report.html").write_text(page, encoding="utf-8")
        work.progress.done = 1

    def expected(self, rows: dict[str, int]) -> int | None:
        return 1


def collect_facts(work: Work, stages: list[StageSummary], paid_for_others: float) -> list[Fact]:
    """Returns the facts below the verdict: recipe, models, judge, cost, time and date. A fact that
    is unknown is left out. `paid_for_others` is in dollars."""
    manifests = [artifact.manifest for artifact in work.inputs.values()]
    recipes = [manifest.recipe for manifest in manifests if manifest.recipe]
    judges = [m.models[j] for m in manifests if (j := str(m.settings.get("judge"))) in m.models]
    distinct = _distinct(work.inputs)
    made_once = [stage for stage in stages if stage.name in distinct]
    paid = sum(stage.paid for stage in made_once) + paid_for_others
    made = date.today().isoformat()
    texts = {
        "Recipe": recipes[-1] if recipes else "",
        "Models": _models(work),
        "Judge": "; ".join(dict.fromkeys(map(describe_model, judges))),
        "Cost": _cost(paid, manifests),
        "Time": f"{duration(sum(stage.seconds for stage in made_once))}, {_count(len(stages))}",
        "Date": f"{made}, zephyr_ray {__version__}",
    }
    return [Fact(name, text) for name, text in texts.items() if text]


def _distinct(inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    """Returns each artifact once, by the first name; stages of the same content share theirs."""
    names: dict[Path, str] = {}
    for name, artifact in inputs.items():
        names.setdefault(artifact.folder, name)
    return {name: inputs[name] for name in names.values()}


def _spent_on_others(work: Work) -> dict[str, Spent]:
    """Returns what the recipe's runs spent, by model, on stages that the report does not list."""
    # An artifact that another recipe made lists what that recipe spent.
    listed = {a.folder.name for a in work.inputs.values() if a.manifest.recipe == work.recipe}
    return spent_besides(work.storage, work.recipe, listed)


def _count(stages: int) -> str:
    return f"{stages} stage{'' if stages == 1 else 's'}"


def _cost(paid: float, manifests: list[Manifest]) -> str:
    """Returns the cost as text, with the endpoints whose cost is unknown for lack of a price."""
    unpriced = {
        name
        for manifest in manifests
        for name, facts in manifest.models.items()
        if (engine := ENGINES.get(facts.get("engine", ""))) and engine.metered
        if f"{PAID}{name}/dollars" not in manifest.counts
    }
    if unpriced:
        unknown = f"unknown for {', '.join(sorted(unpriced))} (no price set)"
        return f"{dollars(paid)}, {unknown}" if paid else unknown
    return dollars(paid) if paid else "nothing was paid"


def _models(work: Work) -> str:
    """Names the trained models, and the weights that training started from."""
    trained = [name for name in work.inputs if work.stages[name].trains_model]
    starts = [
        Path(spec["weights"]).name
        for name in trained
        for model, spec in work.inputs[name].manifest.models.items()
        if model not in work.inputs and spec.get("weights")
    ]
    names = ", ".join(trained) if len(trained) <= MOST_NAMES else f"{len(trained)} models"
    return " from ".join(filter(None, (names, ", ".join(dict.fromkeys(starts)))))
