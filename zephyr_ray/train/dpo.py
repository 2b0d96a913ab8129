"""Trains on preference pairs: direct preference optimization against the frozen start model, the
second half of Zephyr's recipe."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from zephyr_ray.chat import ChatFormat, Messages
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import Work
from zephyr_ray.train.settings import Schedule
from zephyr_ray.train.stage import Row, Tokens, TrainingStage

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective


class Dpo(TrainingStage):
    """Defaults are the paper's (arXiv 2310.16944): three epochs, linear, 5e-7, batch 32, β 0.1."""

    kind = "dpo"
    version = 2
    unit = "pairs"
    sequences_per_row = 2
    reference_flops = 2
    proven = "chosen"

    data: Annotated[str, Reads("pairs")]
    validation: Annotated[str | float | None, ADDED, Reads("pairs")] = None
    beta: float = Field(0.1, gt=0)
    """Weight of the KL penalty against the start model."""
    learning_rate: float = Field(5e-7, gt=0)
    schedule: Schedule = "linear"
    epochs: float = Field(3, gt=0)
    global_batch: int = Field(32, ge=1)
    max_length: int = Field(1024, ge=16)
    """Maximum tokens of prompt and answer together; longer answers are truncated."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood per token, added to the DPO loss."""

    def objective(self) -> "Objective":
        from zephyr_ray.train.objectives import DpoObjective

        return DpoObjective(beta=self.beta, nll_weight=self.nll_weight)

    def prepare(self, work: Work, chat: ChatFormat, rows: list[Row]) -> list[int]:
        from datasets import Dataset

        kept = list(self._tokens(work, chat, rows))
        if not kept:
            raise Permanent(f"stage '{work.name}': no pair of '{self.data}' is left to train on")
        Dataset.from_list(kept).save_to_disk(str(work.scratch / "data"))
        work.counts |= {
            "rows": len(kept),
            "tokens": sum(sum(row["lengths"]) for row in kept),
            "trained_tokens": sum(len(row["chosen_ids"] + row["rejected_ids"]) for row in kept),
        }
        return [max(row["lengths"]) for row in kept]

    def _tokens(self, work: Work, chat: ChatFormat, rows: list[Row]) -> Iterator[Tokens]:
        work.counts["truncated"] = 0

        def tokenize(row: Row) -> Tokens | None:
            prompt, chosen = answer(chat, row["chosen"])
            other, rejected = answer(chat, row["rejected"])
            if prompt != other:
                raise RowError("two different prompts")
            room = self.max_length - len(prompt)
            if room <= 0:
                work.drop("prompt_fills_max_length", row["id"])
                return None
            work.counts["truncated"] += len(chosen) > room or len(rejected) > room
            chosen, rejected = chosen[:room], rejected[:room]
            if chosen == rejected or not (chosen and rejected):
                work.drop("same_or_empty_answers", row["id"])
                return None
            return {
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "lengths": [len(prompt) + len(chosen), len(prompt) + len(rejected)],
            }

        return self.tokens(work, rows, tokenize)


def answer(chat: ChatFormat, messages: Messages) -> tuple[list[int], list[int]]:
    """Returns the tokens of the prompt, and of the last answer with its end token.

    A truncated answer has no end token, because it does not end on its own.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError("a pair must end with an assistant message")
    ids, trained = chat.render(messages)
    last = chat.answers(ids, trained)[-1]
    end = last.stop - (messages[-1].get("finish_reason") == "length")
    return ids[: last.start], ids[last.start : end]
