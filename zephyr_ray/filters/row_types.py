"""Cleans one row of dialogues, prompts or pairs with a list of filters."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from zephyr_ray.filters.passage import Filter, Passage, Tally
from zephyr_ray.messages import Exchange, Message, exchanges
from zephyr_ray.models import constraints
from zephyr_ray.models.true_case import true_case

Row = dict[str, Any]
NOTHING = "nothing"
"""Text in examples for what is left of a removed row."""
Scores = Mapping[str, float | None]
"""Scores of the judge by `score_id`."""


class RowType(Protocol):
    """How rows of one type of artifact are cleaned and identified."""

    noun: str
    """Name of a row in error lines."""

    def clean(
        self, row: Row, filters: Sequence[Filter], scores: Scores, tally: Tally
    ) -> Row | None:
        """Returns what the filters leave of a row; None if it is removed."""

    def identity(self, row: Row) -> str:
        """Returns a text that only duplicates share."""

    def text(self, row: Row) -> str:
        """Returns the text by which near duplicates are found."""

    def group(self, row: Row) -> str:
        """Returns the text of a group of rows that are never near duplicates of each other; "" if
        the row is in no group."""

    def title(self, row: Row) -> str:
        """Returns the text that names the row in examples."""


class Dialogues:
    """Cuts a dialogue before its first bad exchange, and corrects the capitals of the others."""

    noun = "dialogue"

    def clean(
        self, row: Row, filters: Sequence[Filter], scores: Scores, tally: Tally
    ) -> Row | None:
        messages = [dict(message) for message in row["messages"]]
        end, left = 0, 0
        for exchange in exchanges(messages):
            passage = _passage(messages, exchange, scores.get(score_id(row, exchange)))
            if fault := tally.check(passage, filters):
                tally.remove(
                    passage, fault, f"the exchanges before it: {left}" if left else NOTHING
                )
                break
            instruction = "\n".join(passage.tasks)
            for index in exchange.questions:
                _correct_case(messages[index], None, tally)
            _correct_case(messages[exchange.answer], (row.get("constraint"), instruction), tally)
            end = exchange.answer + 1
            left += bool(exchange.questions)
        if not left:
            tally.add("dropped dialogues")
            return None
        return {**row, "messages": messages[:end]}

    def identity(self, row: Row) -> str:
        first = self._first(row)
        return " ".join(m["content"] for m in row["messages"][: first.answer + 1]).casefold()

    def text(self, row: Row) -> str:
        return "\n".join(m["content"] for m in row["messages"] if m["role"] != "system")

    def group(self, row: Row) -> str:
        return ""

    def title(self, row: Row) -> str:
        return prompt_of(row["messages"], self._first(row))

    def _first(self, row: Row) -> Exchange:
        return next(exchange for exchange in exchanges(row["messages"]) if exchange.questions)


class Prompts:
    """Keeps or removes a prompt as a whole."""

    noun = "prompt"

    def clean(
        self, row: Row, filters: Sequence[Filter], scores: Scores, tally: Tally
    ) -> Row | None:
        passage = Passage((row["instruction"],), row["prompt"])
        if fault := tally.check(passage, filters):
            tally.remove(passage, fault, NOTHING)
            return None
        return row

    def identity(self, row: Row) -> str:
        return str(row["prompt"]).casefold()

    def text(self, row: Row) -> str:
        return str(row["instruction"])

    def group(self, row: Row) -> str:
        return ""

    def title(self, row: Row) -> str:
        return str(row["prompt"])


class Pairs:
    """Keeps or removes a pair as a whole, by its prompt and its chosen answer. The rejected answer
    may be bad, because training makes it less likely, but not part of an evaluation set."""

    noun = "pair"

    def clean(
        self, row: Row, filters: Sequence[Filter], scores: Scores, tally: Tally
    ) -> Row | None:
        chosen, rejected = row["chosen"], row["rejected"][-1]["content"]
        for exchange in exchanges(chosen):
            is_last = exchange.answer == len(chosen) - 1
            passage = _passage(chosen, exchange, rejected=rejected if is_last else None)
            if fault := tally.check(passage, filters):
                tally.remove(passage, fault, NOTHING)
                return None
        return row

    def identity(self, row: Row) -> str:
        return self.text(row).casefold()

    def text(self, row: Row) -> str:
        texts = [m["content"] for m in row["chosen"]]
        return "\n".join([*texts, row["rejected"][-1]["content"]])

    def group(self, row: Row) -> str:
        """Returns the question: the pairs of one question may share the chosen answer."""
        return "\n".join(m["content"] for m in row["chosen"][:-1])

    def title(self, row: Row) -> str:
        return str(row["prompt"])


ROW_TYPES: dict[str, RowType] = {
    "dialogues": Dialogues(),
    "prompts": Prompts(),
    "pairs": Pairs(),
}
"""Row types by type of artifact."""


def score_id(row: Row, exchange: Exchange) -> str:
    return f"{row['id']}/{exchange.answer}"


def prompt_of(messages: list[Message], exchange: Exchange) -> str:
    return "\n".join(messages[index]["content"] for index in exchange.questions)


def tasks_of(messages: list[Message], exchange: Exchange) -> tuple[str, ...]:
    """Returns the questions without the sentences that state a constraint."""
    questions = [messages[index] for index in exchange.questions]
    return tuple(question.get("instruction", question["content"]) for question in questions)


def _passage(
    messages: list[Message],
    exchange: Exchange,
    score: float | None = None,
    rejected: str | None = None,
) -> Passage:
    others = messages[exchange.start : exchange.answer]
    return Passage(
        tasks=tasks_of(messages, exchange),
        prompt=prompt_of(messages, exchange),
        answer=messages[exchange.answer]["content"],
        system=tuple(m["content"] for m in others if m["role"] != "user"),
        rejected=rejected,
        score=score,
    )


def _correct_case(
    message: Message, task: tuple[dict[str, Any] | None, str] | None, tally: Tally
) -> None:
    """Corrects capitals in place, unless that breaks the constraint. `task` is the constraint and
    the instruction of an answer; None for a question."""
    before = message["content"]
    after = true_case(before)
    if after == before:
        return
    constraint, instruction = task or (None, "")
    if constraint:
        held_before = constraints.holds(constraint, before, instruction)[0]
        if held_before and not constraints.holds(constraint, after, instruction)[0]:
            return
    message["content"] = after
    tally.add("true-cased", [[before, after]])
