"""Cleaning dialogues as Zephyr cleaned UltraChat, each rule counted and shown by examples."""

import re
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent
from zephyr_ray.judges import FORMS
from zephyr_ray.messages import Message, answers, exchanges, with_facts
from zephyr_ray.models import constraints
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.similarity import Kept
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, Stage, Work

NEAR = 0.7

UNHELPFUL = re.compile(
    r"\b(?:i|as an? (?:ai|language model|chatbot|assistant)[^.!?]{0,40})\b[^.!?]{0,30}?"
    r"(?:(?:do not|don['’]t|cannot|can['’]t|am (?:unable|not able) to) "
    r"(?:have|possess|feel|hold|experience|form|offer|express)|have no)\b[^.!?]{0,20}?"
    r"\b(?:personal (?:experience|opinion|emotion|feeling|belief|preference)s?"
    r"|emotions|feelings|opinions)\b",
    re.IGNORECASE,
)
"""An assistant that says it has no experiences, emotions or opinions of its own."""


SENTENCE_START = re.compile(
    r"(?:\A|(?<=[a-z]{2}[.!?][ \n])(?<!etc\.[ \n])(?<!vs\.[ \n])(?<!approx\.[ \n]))"
    r"[a-z](?=[a-z'’-]*[,.!?:;]*(?:\s|\Z))"
)
"""A small letter after the end of a sentence, in a word of small letters only (no iPhone, no URL).

One letter before the full stop is an abbreviation ("e.g. this").
"""


class Clean(Stage):
    """A dialogue is cut before its first bad answer, and dropped when nothing is left."""

    kind = "clean"
    makes = "dialogues"
    version = 2

    dialogues: Annotated[str, Reads("dialogues")]
    judge: Annotated[str | None, Reads("judge", form="score")] = None
    """Keeps only answers this judge scores `min_score` or more."""
    min_score: float = Field(10.0, ge=1, le=10)
    apart_from: Annotated[str | None, Reads("prompts")] = None
    """Held-out prompts: a dialogue is cut before a question that nearly repeats one of them, which
    a teacher's follow-up may do. (ROUGE-L F above 0.7, as in Self-Instruct.)"""
    seed: int = 0

    def run(self, work: Work) -> None:
        rows = [with_facts(row) for row in work.inputs[self.dialogues].rows()]
        scores = self._scores(rows, work) if self.judge else {}
        held_out = work.inputs[self.apart_from].rows() if self.apart_from else []
        apart = Kept([row["instruction"] for row in held_out])
        kept: list[dict[str, Any]] = []
        seen: set[str] = set()
        for row in rows:
            messages = self._good(row, scores, apart, work)
            if not answers(messages):
                work.counts["dropped dialogues"] = work.counts.get("dropped dialogues", 0) + 1
                continue
            [first, *_] = exchanges(messages)
            identity = " ".join(m["content"] for m in messages[: first[1] + 1]).casefold()
            if identity in seen:
                work.drop("duplicate", messages[first[0]]["content"])
                continue
            seen.add(identity)
            kept.append({**row, "messages": messages})
        if not kept:
            why = [f"{n:.0f} {k.removeprefix('dropped/')}" for k, n in work.counts.items() if n]
            raise Permanent(
                f"stage '{work.name}': no dialogue is left ({', '.join(why)}); make more of them, "
                "or lower min_score"
            )
        work.write_rows(kept)

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        return reads.get(self.dialogues)

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if self.judge is None or (dialogues := rows.get(self.dialogues)) is None:
            return {}
        answers_each, tokens = reads[self.dialogues].answer_bounds()
        return {self.judge: FORMS["score"].calls(dialogues * answers_each, PROMPT_TOKENS, tokens)}

    def _good(
        self, row: dict[str, Any], scores: dict[str, float | None], apart: Kept, work: Work
    ) -> list[Message]:
        """Returns the messages before the first question whose answer is bad, in their casing."""
        messages = [dict(message) for message in row["messages"]]
        for question, place in exchanges(messages):
            asked, answer = messages[question], messages[place]
            rule = self._fault(asked, answer, scores.get(f"{row['id']}/{place}"), apart)
            if rule:
                work.drop(rule, {"prompt": asked["content"], "answer": answer["content"]})
                return messages[:question]
            _correct_case(asked, None, work)
            _correct_case(answer, (row.get("constraint"), _instruction(asked)), work)
        return messages

    def _fault(
        self, asked: Message, answer: Message, score: float | None, apart: Kept
    ) -> str | None:
        """Returns the rule that the exchange breaks, or None."""
        if apart.nearest(_instruction(asked)) > NEAR:
            return "near a held-out prompt"
        if not answer["content"].strip():
            return "empty answer"
        if UNHELPFUL.search(answer["content"]):
            return "unhelpful assistant"
        if self.judge and score is None:
            return "answer not scored"
        if self.judge and score is not None and score < self.min_score:
            return "answer below min_score"
        return None

    def _scores(self, rows: list[dict[str, Any]], work: Work) -> dict[str, float | None]:
        """Returns scores by "<dialogue>/<index of the answer>"."""
        requests = [
            {
                "id": f"{row['id']}/{place}",
                "instruction": _instruction(row["messages"][question]),
                "prompt": row["messages"][question]["content"],
                "constraint": row["constraint"],
                "completion": {
                    "text": row["messages"][place]["content"],
                    "finish_reason": row["messages"][place].get("finish_reason", "stop"),
                },
            }
            for row in rows
            for question, place in exchanges(row["messages"])
        ]
        rated = run_rows(work, requests, rate, [work.models[str(self.judge)]])
        return {row["id"]: row["score"] for row in rated}


def _instruction(question: Message) -> str:
    return question.get("instruction", question["content"])


def _correct_case(
    message: Message, asked: tuple[dict[str, Any] | None, str] | None, work: Work
) -> None:
    """Corrects capitals in place, unless the constraint asked for the casing as it is. `asked` is
    an answer's constraint and instruction."""
    before = message["content"]
    after = true_case(before)
    if after == before:
        return
    constraint, instruction = asked or (None, "")
    if constraint:
        held = constraints.holds(constraint, before, instruction)[0]
        if held and not constraints.holds(constraint, after, instruction)[0]:
            return
    message["content"] = after
    work.counts["true-cased"] = work.counts.get("true-cased", 0) + 1
    examples = work.examples.setdefault("true-cased", [])
    if len(examples) < 3:
        examples.append([before, after])


async def rate(row: dict[str, Any], ask: Ask) -> dict[str, Any]:
    return {"id": row["id"], **await ask.judge("score", row, [row["completion"]])}


def true_case(text: str) -> str:
    """Capital letters at the start of sentences and for the word "i".

    A text with no capital at all, or in capitals throughout, is a style and is left alone.
    """
    if text == text.lower() or text == text.upper():
        return text
    # "i in", "i is": a counter in code.
    text = re.sub(r"(?<![\w'’.])i(?=['’](?:m|ve|ll|d)\b|\s+(?!(?:in|is)\b)[a-z])", "I", text)
    return SENTENCE_START.sub(lambda found: found[0].upper(), text)
