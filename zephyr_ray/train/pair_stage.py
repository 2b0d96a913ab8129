"""Tokenizes preference pairs, for all stages that read them."""

from collections import Counter
from typing import Annotated

from pydantic import Field

from zephyr_ray.chat import ChatFormat, Messages
from zephyr_ray.errors import RowError
from zephyr_ray.settings import Reads
from zephyr_ray.train.data import Tokens
from zephyr_ray.train.preparation import NothingToTrain, Row
from zephyr_ray.train.stage import WorkerStage


class PairStage(WorkerStage):
    """Runs a model on preference pairs."""

    unit = "pairs"
    sequences_per_row = 2
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    row_name = "pair"

    data: Annotated[str, Reads("pairs")]
    max_length: int = Field(1024, ge=16)
    """Maximum tokens of prompt and answer together; longer answers are truncated."""

    def tokenize(self, chat: ChatFormat, row: Row, counts: Counter[str]) -> Tokens:
        prompt, chosen = answer(chat, row["chosen"])
        other, rejected = answer(chat, row["rejected"])
        if prompt != other:
            raise RowError("two different prompts")
        room = self.max_length - len(prompt)
        if room <= 0:
            raise NothingToTrain("prompt_fills_max_length")
        counts["truncated"] += len(chosen) > room or len(rejected) > room
        chosen, rejected = chosen[:room], rejected[:room]
        if chosen == rejected or not (chosen and rejected):
            raise NothingToTrain("same_or_empty_answers")
        counts["tokens"] += 2 * len(prompt) + len(chosen) + len(rejected)
        counts["trained_tokens"] += len(chosen) + len(rejected)
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def answer(chat: ChatFormat, messages: Messages) -> tuple[list[int], list[int]]:
    """Returns the tokens of the prompt, and of the last answer with its end token.

    If generation stopped at its token limit (`finish_reason` is `length`), the end token is left
    out.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError("chosen and rejected must each end with an assistant message")
    ids, trained = chat.render(messages)
    last = chat.answers(ids, trained)[-1]
    end = last.stop - (messages[-1].get("finish_reason") == "length")
    return ids[: last.start], ids[last.start : end]
