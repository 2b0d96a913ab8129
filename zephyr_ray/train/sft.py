"""Fine-tunes a model on dialogues: supervised fine-tuning, the first half of Zephyr's recipe."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from zephyr_ray.chat import ChatFormat
from zephyr_ray.messages import answers
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import Work
from zephyr_ray.train.data import Data, Tokens
from zephyr_ray.train.packing import open_data, pack, write_packing
from zephyr_ray.train.preparation import NothingToTrain, Row
from zephyr_ray.train.settings import Schedule
from zephyr_ray.train.stage import TrainingStage

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective

IGNORED = -100
"""Label of a token that is not trained."""


class Sft(TrainingStage):
    """Defaults are the paper's (arXiv 2310.16944): one epoch, cosine, 2e-5, batch 512 × 2048."""

    kind = "sft"
    version = 2
    unit = "sequences"
    sequences_per_row = 1
    columns = ("input_ids", "labels")
    row_name = "dialogue"
    proven = "messages"

    data: Annotated[str, Reads("dialogues")]
    validation: Annotated[str | float | None, ADDED, Reads("dialogues")] = None
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Schedule = "cosine"
    epochs: float = Field(1, gt=0)
    global_batch: int = Field(512, ge=1)
    max_length: int = Field(2048, ge=16)
    packing: bool = True
    """Fills sequences of max_length with several dialogues, which do not attend to each other."""

    @property
    def packs(self) -> bool:
        return self.packing

    def objective(self) -> "Objective":
        from zephyr_ray.train.objectives import SftObjective

        return SftObjective(packing=self.packing)

    def prepare(self, work: Work, selects: Callable[[Row], bool] | None = None) -> Data:
        data = super().prepare(work, selects)
        folder = work.scratch / "data"
        if self.packing:
            write_packing(folder, pack(data.lengths, self.max_length, self.seed))
            data = open_data(folder)
            work.counts["packing_fill"] = float(data.lengths.mean()) / self.max_length
        work.counts["sequences"] = len(data)
        return data

    def tokenize(self, chat: ChatFormat, row: Row, counts: Counter[str]) -> Tokens:
        ids, trained = chat.render(row["messages"])
        labels, read, count = [IGNORED] * len(ids), ids[: self.max_length], 0
        for span, answer in zip(chat.answers(ids, trained), answers(row["messages"]), strict=True):
            # If generation stopped at its token limit, the answer's end token is not trained.
            stop = span.stop - (answer.get("finish_reason") == "length")
            labels[span.start : stop] = ids[span.start : stop]
            count += max(0, min(stop, len(read)) - span.start)
        counts["truncated"] += len(read) < len(ids)
        if not count:
            raise NothingToTrain("truncated_to_nothing")
        counts["tokens"] += len(read)
        counts["trained_tokens"] += count
        return {"input_ids": read, "labels": labels[: len(read)]}
