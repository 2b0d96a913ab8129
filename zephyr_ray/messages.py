"""Defines messages with facts about them, and functions that read conversations by role.

A message is `{"role": "system" | "user" | "assistant", "content": text}`, plus facts about it:
`finish_reason` of an answer ("stop": the model ended it, "length": cut off at the token limit), and
`instruction` of a question (the task without the sentence that states a constraint).
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex

from zephyr_ray.errors import RowError

Message = dict[str, str]

_UNSEEN = regex.compile(r"[\p{Default_Ignorable_Code_Point}\x00-\x08\x0e-\x1b\x7f\u2800]")
"""Matches characters without a shape: controls, joiners, fillers, variation selectors, tags."""


def user(content: str, **facts: str) -> Message:
    return {"role": "user", "content": content, **facts}


def assistant(content: str, **facts: str) -> Message:
    return {"role": "assistant", "content": content, **facts}


def plain(messages: list[Message]) -> list[Message]:
    """Returns the messages without their facts, as models see them."""
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def answers(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "assistant"]


@dataclass(frozen=True)
class Exchange:
    """An answer and the questions that it answers, as indices of a conversation's messages."""

    start: int
    """The first message after the previous answer, such as a system message."""
    questions: tuple[int, ...]
    """The user messages since the previous answer; without any, the questions of that answer."""
    answer: int


def exchanges(messages: list[Message]) -> Iterator[Exchange]:
    """Yields the exchanges of a conversation; messages after the last answer belong to none."""
    start = 0
    questions: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] == "user":
            if questions and questions[0] < start:
                questions = []
            questions.append(index)
        elif message["role"] == "assistant":
            yield Exchange(start, tuple(questions), index)
            start = index + 1


def encodable(text: str) -> str:
    """Returns a text with a question mark for each lone surrogate: half of a pair, from a cut
    emoji, is valid JSON, but can be neither sent nor stored."""
    return text.encode(errors="replace").decode()


def visible(text: str) -> str:
    """Returns a text as a reader sees it: without invisible characters, differences of Unicode
    normalization, and whitespace around it or at line ends."""
    text = _UNSEEN.sub("", unicodedata.normalize("NFC", text))
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def is_same_text(a: str, b: str) -> bool:
    """Returns whether two answers look the same, so that nobody can prefer one."""
    return a == b or visible(a) == visible(b)


def empty_answer(text: str, finish_reason: str | None, max_tokens: int) -> RowError | None:
    """Returns the fault of an answer without visible text; None if it has some."""
    if visible(text):
        return None
    if finish_reason == "length":
        why = f"max_tokens ({max_tokens}) was used up before any text, perhaps by reasoning"
        return RowError(f"the answer is empty: {why}; raise max_tokens", "empty")
    return RowError("the answer is empty", "empty")


def with_facts(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of dialogues or pairs whose messages carry their facts.

    In rows of earlier versions, facts are in parallel columns: `finish` and `instructions` of
    dialogues, `finish_chosen` and `finish_rejected` of pairs.
    """
    row = dict(row)
    finish, instructions = row.pop("finish", []), row.pop("instructions", [])
    if "messages" in row:
        row["messages"] = _facts(row["messages"], "assistant", "finish_reason", finish)
        last = [m["content"] for m in row["messages"] if m["role"] == "user"][-1:]
        # The instruction of a published pair was its first prompt, even if it had later ones.
        if instructions and last and last[0].casefold().startswith(instructions[-1].casefold()):
            row["messages"] = _facts(row["messages"], "user", "instruction", instructions)
    for side in ("chosen", "rejected"):
        reason = row.pop(f"finish_{side}", None)
        if reason is not None:
            row[side] = _facts(row[side], "assistant", "finish_reason", [reason])
    return row


def _facts(messages: list[Message], role: str, fact: str, values: list[str]) -> list[Message]:
    """Returns the messages with one fact added to each message of a role. Fewer values
    than messages belong to the last ones: the turns before a chosen answer had no facts."""
    indices = [index for index, message in enumerate(messages) if message["role"] == role]
    facts = dict(zip(indices[-len(values) :] if values else [], values, strict=False))
    return [
        {fact: facts[index], **message} if facts.get(index) is not None else message
        for index, message in enumerate(messages)
    ]
