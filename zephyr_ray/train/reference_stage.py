"""Computes the log-probabilities of preference pairs under the model that DPO starts from."""

from statistics import fmean
from typing import Annotated, Any, Literal

from zephyr_ray.demand import Footprint
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.errors import Temporary
from zephyr_ray.section import Chapter, Column, Place, Section, Table
from zephyr_ray.settings import OPERATIONAL
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact
from zephyr_ray.train import memory
from zephyr_ray.train.job import WorkerJob
from zephyr_ray.train.pair_stage import PairStage
from zephyr_ray.train.reference import JOURNAL
from zephyr_ray.train.workers import run_workers

INTRO = (
    "Log-probabilities of the answers under the model that DPO starts from, summed over their "
    "tokens; the margin is the chosen answer's minus the rejected one's."
)


class Reference(PairStage):
    """Computes natural log-probabilities of chosen and rejected answers, once for all dpo stages
    that start from the same weights."""

    kind = "reference"
    makes = "log_probs"
    quantized_by = "quantized"

    offload: Annotated[Literal["none", "all"], OPERATIONAL] = "none"
    """Whether the weights are kept in CPU memory, not on the GPU (zero 3)."""
    quantized: bool = False
    """Loads the initial weights in 4 bits, as dpo does with lora.quantized."""

    def is_quantized(self) -> bool:
        return self.quantized

    def run(self, work: Work) -> None:
        weights = work.models[self.model].weights
        self.prepare(work)
        entries: dict[int, dict[str, Any]] = {}

        def note(entry: dict[str, Any]) -> None:
            entries[entry["row"]] = entry
            work.progress.done = len(entries)

        work.progress.unit, work.progress.total = self.unit, int(work.counts["rows"])
        run_workers(work, WorkerJob(self, weights, work.folder), JOURNAL, note)
        if len(entries) < work.progress.total:
            raise Temporary(
                f"{work.progress.total - len(entries)} pairs have no log-probabilities; the others "
                "are kept"
            )
        names = ("id", "chosen", "rejected")
        rows = [{name: entries[row][name] for name in names} for row in sorted(entries)]
        margins = [row["chosen"] - row["rejected"] for row in rows]
        work.counts["margin_mean"] = fmean(margins)
        work.counts["chosen_more_probable"] = fmean(margin > 0 for margin in margins)
        work.write_rows(rows)

    def footprint(self, models: dict[str, RecipeModel]) -> Footprint:
        [start] = models.values()
        shape = start.shape()
        if shape is None:
            return Footprint()
        needed = memory.forward_memory(self, shape)
        return Footprint(
            memory=self.workers.least
            * (needed.host + (0 if self.gpus_per_worker else needed.total)),
            fix=lambda memory: self.memory_savings(),
        )

    def section(self, artifact: Artifact) -> Section:
        """Returns how the start model ranks the pairs."""
        counts = artifact.manifest.counts
        names = ("rows", "margin_mean", "chosen_more_probable")
        columns = (
            Column("stage"),
            Column("pairs", digits=0),
            Column("mean margin", digits=1, signed=True),
            Column("chosen more probable", digits=2),
        )
        row = (artifact.manifest.name, *(counts.get(name) for name in names))
        table = Table(columns, (row,))
        return Section((Chapter("Reference", Place.PROCESS, (table,), INTRO),))
