"""Writes the report: one self-contained HTML page about a run."""

from datetime import date
from pathlib import Path
from typing import Annotated

from zephyr_ray.formatting import duration, number
from zephyr_ray.report import plots
from zephyr_ray.report.chapters import arrange, cell
from zephyr_ray.report.stages import shortened, stage_row
from zephyr_ray.section import Section
from zephyr_ray.settings import Reads
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import Artifact

TEMPLATE = Path(__file__).with_name("template.html")


class Report(Stage):
    kind = "report"
    makes = "report"
    view = ("report.html", "report.html")
    reads_lineage = True

    of: Annotated[list[str], Reads("any")]
    """The stages to report on; those they depend on are included."""
    title: str = "Zephyr"

    def run(self, work: Work) -> None:
        work.progress.unit = "page"
        contributed = {
            name: section
            for name, artifact in work.inputs.items()
            if (section := work.stages[name].section(artifact))
        }
        page = render(self.title, work.inputs, contributed)
        (work.folder / "report.html").write_text(page, encoding="utf-8")
        work.progress.done = 1

    def expected(self, rows: dict[str, int]) -> int | None:
        return 1


def render(title: str, inputs: dict[str, Artifact], sections: dict[str, Section]) -> str:
    """Renders the page. The template escapes all text from models and data, without exception."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, duration=duration, cell=cell, shortened=shortened)
    stages = [stage_row(name, artifact) for name, artifact in inputs.items()]
    seconds = {row["name"]: row["seconds"] for row in stages if row["seconds"]}
    headlines = [section.headline for section in sections.values() if section.headline]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        date=date.today().isoformat(),
        headline=headlines[-1] if headlines else "",
        chapters=arrange(sections),
        stages=stages,
        wall_time=plots.time_bars(seconds) if seconds else None,
        total_seconds=sum(seconds.values()),
    )
