"""Defines what stages that read preference pairs share: their tokens."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from zephyr_ray.chat import ChatFormat, Messages
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.settings import Reads
from zephyr_ray.stage import Work
from zephyr_ray.train.stage import Row, Tokens, WorkerStage


class PairStage(WorkerStage):
    """A stage that runs a model on preference pairs."""

    unit = "pairs"
    sequences_per_row = 2

    data: Annotated[str, Reads("pairs")]
    max_length: int = Field(1024, ge=16)
    """Maximum tokens of prompt and answer together; longer answers are truncated."""

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
                "id": row["id"],
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
