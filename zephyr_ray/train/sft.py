"""Fine-tunes a model on dialogues: supervised fine-tuning, the first half of Zephyr's recipe."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.messages import answers
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import Work
from zephyr_ray.train.settings import Schedule
from zephyr_ray.train.stage import Row, Tokens, TrainingStage

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

    def prepare(self, work: Work, chat: ChatFormat, rows: list[Row]) -> list[int]:
        import numpy as np
        from datasets import Dataset, Features, Sequence, Value

        # Arrays, because 285 M tokens in lists of Python numbers would take 20 GB.
        kept = [
            {name: np.array(tokens, np.int32) for name, tokens in row.items()}
            for row in self._tokens(work, chat, rows)
        ]
        if not kept:
            raise Permanent(
                f"stage '{work.name}': no dialogue of '{self.data}' is left to train on"
            )
        features = Features({name: Sequence(Value("int32")) for name in ("input_ids", "labels")})
        data = Dataset.from_list(kept, features=features)
        if self.packing:
            from trl.data_utils import pack_dataset

            data = pack_dataset(data.shuffle(seed=self.seed), self.max_length, "bfd")
        data.save_to_disk(str(work.scratch / "data"))
        lengths = [len(ids) for ids in data["input_ids"]]
        work.counts |= {
            "rows": len(kept),
            "sequences": len(lengths),
            "tokens": sum(lengths),
            "trained_tokens": sum(int((row["labels"] != IGNORED).sum()) for row in kept),
        }
        if self.packing:
            work.counts["packing_fill"] = sum(lengths) / len(lengths) / self.max_length
        return lengths

    def _tokens(self, work: Work, chat: ChatFormat, rows: list[Row]) -> Iterator[Tokens]:
        work.counts["truncated"] = 0

        def tokenize(row: Row) -> Tokens | None:
            ids, trained = chat.render(row["messages"])
            # A truncated answer does not end on its own, so its end token is not trained.
            for span, answer in zip(
                chat.answers(ids, trained), answers(row["messages"]), strict=True
            ):
                trained[span[-1]] = answer.get("finish_reason") != "length"
            if len(ids) > self.max_length:
                work.counts["truncated"] += 1
                ids, trained = ids[: self.max_length], trained[: self.max_length]
            if not any(trained):
                work.drop("truncated_to_nothing", row["id"])
                return None
            labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]
            return {"input_ids": ids, "labels": labels}

        return self.tokens(work, rows, tokenize)
