"""The report stage: one self-contained HTML page about a whole run."""

from datetime import date
from pathlib import Path
from typing import Annotated

from zephyr_ray.report import contents
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
    """The stages it is about; those they depend on are told too."""
    title: str = "Zephyr"

    def run(self, work: Work) -> None:
        work.progress.unit = "page"
        page = render(self.title, work.inputs)
        (work.folder / "report.html").write_text(page, encoding="utf-8")
        work.progress.done = 1

    def expected(self, rows: dict[str, int]) -> int | None:
        return 1


def render(title: str, inputs: dict[str, Artifact]) -> str:
    """The page. Text from models and data is escaped by the template, without exception."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=contents.number, signed=contents.signed, duration=contents.duration
    )
    stages = contents.stages(inputs)
    colours = contents.Palette()
    evaluations = contents.evaluations(inputs, colours)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        date=date.today().isoformat(),
        headline=contents.headline(evaluations[-1]) if evaluations else "",
        evaluations=evaluations,
        curves=contents.curves(inputs, colours),
        scores=contents.scores(inputs, colours),
        stages=stages,
        wall_time=contents.wall_time(stages),
        total_seconds=sum(stage["seconds"] or 0 for stage in stages),
        proofs=contents.proofs(inputs),
    )
