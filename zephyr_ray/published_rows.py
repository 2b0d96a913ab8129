"""Converts rows of published data sets, in their usual forms, to dialogues, pairs and prompts."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from zephyr_ray import conversations
from zephyr_ray.conversations import NO_ROLES, Unreadable, checked, parse, with_system
from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import list_counts, shorten
from zephyr_ray.messages import Message, assistant, is_same_text, user, visible

Row = dict[str, Any]

LARGEST = 1e100
"""Maximum absolute value of a number; sums of larger ones may overflow."""
INTEGER_END = 2**63
"""Integers of at least this absolute value are stored as floats, because most JSON readers take
only 64-bit integers."""

TIE = "scores tie"
CONTRADICTION = "scores contradict the choice"
SCORE_RULES = (TIE, CONTRADICTION)
"""Rules by which `ties: drop` drops pairs; the pairs themselves are sound."""
EMPTY = "empty prompt"
SYSTEM = "a prompt with a system message"
SEVERAL = "a prompt of several messages"
LENGTHS = "chosen and rejected have different numbers of turns"
CONTEXTS = "chosen and rejected answer different prompts"
OTHER_PROMPT = "the prompt is not that of the conversations"
SAME = "chosen and rejected are the same"
NO_PROMPT = "answers without a prompt"
NO_ANSWERS = "no answers"
NO_TEXT = "an answer that is not text"
NOT_RATED = "answers without scores, ratings or ranks"
RANK_0 = "a rank of 0"
NO_TURNS = "turns that are not a list of texts"
FIXES = {
    **conversations.FIXES,
    EMPTY: "set columns: {prompt: …} to the column of the prompts",
    SYSTEM: "remove the system messages; a prompt is the text of one user message",
    SEVERAL: "keep one user message per prompt",
    LENGTHS: "write pairs that differ only in the last answer",
    CONTEXTS: "write pairs that differ only in the last answer",
    OTHER_PROMPT: "correct columns: {prompt: …}, or remove the column from the data",
    SAME: "set columns: to two different answers",
    NO_PROMPT: "add the questions in a column, and name it in columns: {prompt: …}",
    NO_ANSWERS: "set columns: {completions: …} to the column of the answers",
    NO_TEXT: "write each answer as an object with text, model and score",
    NOT_RATED: "add a score or rank to each answer, or read the prompts with makes: prompts",
    RANK_0: "number ranks from 1, which is the best",
    NO_TURNS: "set columns: {messages: …} to the column of the conversations",
    TIE: "set ties: keep",
    CONTRADICTION: "set ties: keep, or correct score_chosen and score_rejected in columns:",
}
"""Fix in the error line if no row of a data set is usable, by the most frequent reason."""


@dataclass(frozen=True)
class Conversion:
    """A conversion of published rows to one type of our rows."""

    needed: tuple[str, ...]
    """Columns that the data must have, under our names."""
    optional: tuple[str, ...]
    convert: Callable[[Row], Row]
    """Returns our row from a published one. Raises Unreadable if it cannot be used."""
    remarks: Callable[[Row], Iterable[str]] = lambda row: ()
    """Returns the names of the counts to which one of our rows adds."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.needed + self.optional


class Unusable:
    """Rows of a data set that cannot be used, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        """First row by reason."""

    def add(self, reason: Unreadable, row: str, row_id: Any) -> None:
        self._counts[str(reason)] += 1
        facts = [f"id {shorten(str(row_id), 60)!r}"] if row_id is not None else []
        facts += [reason.detail] if reason.detail else []
        example = f"{row} ({', '.join(facts)})" if facts else row
        self._examples.setdefault(str(reason), example)

    def refuse(self, source: Any) -> None:
        """Raises Permanent with the reasons, the first row of the most frequent one, and its fix.
        Does nothing if there are no rows."""
        if self._counts:
            [(main, _), *_] = self._counts.most_common(1)
            raise Permanent(
                f"{source}: none of the first rows is usable ({list_counts(self._counts)}), such "
                f"as {self._examples[main]}; {FIXES[main]}"
            )


def _dialogue(row: Row) -> Row:
    if "messages" not in row and "turns" not in row:
        raise Unreadable("no messages", column="messages")
    messages = parse(row["messages"]) if "messages" in row else _alternating(row["turns"])
    if isinstance(messages, str):
        raise Unreadable(NO_ROLES)
    messages = checked(with_system(messages, row.get("system")))
    return {**task(_questions(messages)[0]), "messages": messages}


def _alternating(turns: Any) -> list[Message]:
    """Returns the messages of texts that alternate between user and assistant, as in UltraChat
    (stingning/ultrachat on the hub)."""
    if not isinstance(turns, list) or not all(isinstance(text, str) for text in turns):
        raise Unreadable(NO_TURNS)
    if not turns:
        raise Unreadable("no messages")
    return [assistant(text) if n % 2 else user(text) for n, text in enumerate(turns)]


def _pair(row: Row) -> Row:
    """Reads TRL's forms: the prompt is a column of its own (explicit), the common beginning of both
    conversations (implicit), or both (as in UltraFeedback-binarized)."""
    if "prompt" in row and is_empty(row["prompt"]):
        raise Unreadable(EMPTY)
    prompt = row.get("prompt")
    sides = [_side(prompt, row[name]) for name in ("chosen", "rejected")]
    chosen, rejected = (checked(with_system(side, row.get("system"))) for side in sides)
    if len(chosen) != len(rejected):
        raise Unreadable(LENGTHS)
    if chosen[:-1] != rejected[:-1]:
        raise Unreadable(CONTEXTS)
    if not (prompt is None or _is_question(prompt, chosen) or _begins_with(chosen, prompt)):
        raise Unreadable(OTHER_PROMPT)
    if is_same_text(chosen[-1]["content"], rejected[-1]["content"]):
        raise Unreadable(SAME)
    return {
        **task(str(prompt) if _is_question(prompt, chosen) else _questions(chosen)[0]),
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": number(row.get("score_chosen")),
        "score_rejected": number(row.get("score_rejected")),
    }


def _prompt(row: Row) -> Row:
    if is_empty(row["prompt"]):
        raise Unreadable(EMPTY)
    prompt = parse(row["prompt"])
    if not isinstance(prompt, str):
        roles = [message["role"] for message in prompt]
        if roles != ["user"]:
            raise Unreadable(SYSTEM if roles == ["system", "user"] else SEVERAL)
        prompt = prompt[0]["content"]
    source = row.get("source")
    return {**task(prompt), "source": source if isinstance(source, str) else "published"}


def disagreement(row: Row) -> str | None:
    """Returns how the scores of a pair disagree with the choice, if they do."""
    chosen, rejected = row.get("score_chosen"), row.get("score_rejected")
    if chosen is None or rejected is None or chosen > rejected:
        return None
    return TIE if chosen == rejected else CONTRADICTION


DIALOGUES = Conversion((), ("messages", "turns", "id", "system"), _dialogue)
PAIRS = Conversion(
    needed=("chosen", "rejected"),
    optional=("prompt", "id", "system", "score_chosen", "score_rejected"),
    convert=_pair,
    remarks=lambda row: [rule] if (rule := disagreement(row)) else [],
)
PROMPTS = Conversion(("prompt",), ("id", "source"), _prompt)


def _side(prompt: Any, value: Any) -> list[Message]:
    """Returns the conversation of chosen or rejected."""
    side = parse(value)
    if isinstance(side, list) and side[0]["role"] != "assistant":
        return side
    if prompt is None:
        raise Unreadable(NO_PROMPT, column="prompt")
    context = parse(prompt)
    if isinstance(side, list):
        return [*_messages(context), *side]
    # In a transcript, whitespace separates the answer from its label.
    is_transcript = isinstance(prompt, str) and context != prompt
    return [*_messages(context), assistant(side.strip() if is_transcript else side)]


def _is_question(prompt: Any, messages: list[Message]) -> bool:
    """Returns whether the prompt is the text of the first or the last question."""
    questions = _questions(messages)
    ends = (questions[0], questions[-1])
    return isinstance(prompt, str) and any(is_same_text(prompt, text) for text in ends)


def _begins_with(messages: list[Message], prompt: Any) -> bool:
    """Returns whether a conversation begins with the messages of its prompt."""
    context = _messages(parse(prompt))
    if context[0]["role"] != "system" and messages[0]["role"] == "system":
        messages = messages[1:]
    return len(context) < len(messages) and all(
        a["role"] == b["role"] and is_same_text(a["content"], b["content"])
        for a, b in zip(context, messages, strict=False)
    )


def _messages(prompt: str | list[Message]) -> list[Message]:
    return [user(prompt)] if isinstance(prompt, str) else prompt


def _questions(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def task(prompt: str) -> Row:
    return {"prompt": prompt, "instruction": prompt, "constraint": None}


def is_empty(prompt: Any) -> bool:
    return prompt is None or (isinstance(prompt, str) and not visible(prompt))


def number(value: Any) -> float | None:
    """Returns a number, which may be given as text; None if it is not one or exceeds LARGEST."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        as_float = float(value)
    except (ValueError, OverflowError):
        return None
    if not abs(as_float) <= LARGEST:  # also false for NaN
        return None
    return value if isinstance(value, int) and abs(value) < INTEGER_END else as_float
