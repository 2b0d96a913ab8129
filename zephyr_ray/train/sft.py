"""Supervised fine-tuning on dialogues: dSFT, the first half of Zephyr's recipe."""

import logging
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.settings import Reads
from zephyr_ray.stage import Work
from zephyr_ray.train.settings import TrainingSettings
from zephyr_ray.train.worker import Job, LeanCheckpoints, load_chat
from zephyr_ray.train.workers import train

log = logging.getLogger("zephyr_ray")

IGNORED = -100
"""The label of a token that is not trained."""


class Sft(TrainingSettings):
    """Defaults are the paper's (arXiv 2310.16944): one epoch, cosine, 2e-5, batch 512 × 2048."""

    kind: ClassVar[str] = "sft"
    version: ClassVar[int] = 2
    unit: ClassVar[str] = "sequences"
    sequences_per_row: ClassVar[int] = 1

    data: Annotated[str, Reads("dialogues")]
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    epochs: float = Field(1, gt=0)
    global_batch: int = Field(512, ge=1)
    max_length: int = Field(2048, ge=16)
    packing: bool = True
    """Several dialogues in one sequence of max_length, which do not see each other."""

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.data)

    def run(self, work: Work) -> None:
        self.batches()
        weights = work.models[self.model].weights
        chat = load_chat(weights)
        rows = work.inputs[self.data].rows()
        lengths = self._prepare(work, chat, rows)
        # Rows are packed already; packed ones keep the positions of each dialogue. Single dialogues
        # are padded: of like length within a step, they cost less padding than attention over all.
        arguments = {
            "packing": False,
            "padding_free": self.packing,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        job = Job(self, weights, work.folder, self.order(lengths), classes, arguments)
        train(work, job)

    def _prepare(self, work: Work, chat: ChatFormat, rows: list[dict[str, Any]]) -> list[int]:
        """Writes scratch/data, counts what is in it and shows the mask; lengths of its rows."""
        import numpy as np
        from datasets import Dataset, Features, Sequence, Value

        # Arrays: 285 M tokens in lists of Python numbers would be 20 GB.
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
        ansi, page = chat.proof(rows[0]["messages"])
        log.info("%s: trained tokens are green\n%s", work.name, ansi)
        (work.folder / "mask.html").write_text(page, encoding="utf-8")
        return lengths

    def _tokens(
        self, work: Work, chat: ChatFormat, rows: list[dict[str, Any]]
    ) -> Iterator[dict[str, list[int]]]:
        work.counts["truncated"] = 0
        for row in rows:
            try:
                ids, trained = chat.render(row["messages"])
            except Permanent as error:
                raise Permanent(f"row '{row['id']}' of '{self.data}': {error}") from None
            # Where an answer was cut off, nobody chose to end: that end is not learnt.
            finish = zip(chat.ends(ids, trained), row.get("finish", []), strict=False)
            for end in [at for at, reason in finish if reason == "length"]:
                trained[end] = False
            if len(ids) > self.max_length:
                work.counts["truncated"] += 1
                ids, trained = ids[: self.max_length], trained[: self.max_length]
            if not any(trained):
                work.drop("truncated_to_nothing", row["id"])
                continue
            labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]
            yield {"input_ids": ids, "labels": labels}


def classes() -> tuple[type, type]:
    """TRL's arguments and trainer; the rows are already tokens and labels."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Trainer(LeanCheckpoints, SFTTrainer):
        pass

    return SFTConfig, Trainer
