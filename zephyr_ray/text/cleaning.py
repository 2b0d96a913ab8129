"""Cleaning dialogues as Zephyr cleaned UltraChat, each rule counted and shown by examples."""

import re
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.models import constraints
from zephyr_ray.models.judging import Judge
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import Reads
from zephyr_ray.stage import Stage, Work
from zephyr_ray.text.similarity import Kept

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

    dialogues: Annotated[str, Reads("dialogues")]
    judge: Annotated[str | None, Reads("judge")] = None
    """Keeps only answers this judge scores `min_score` or more."""
    min_score: float = Field(10.0, ge=1, le=10)
    apart_from: Annotated[str | None, Reads("prompts")] = None
    """Held-out prompts: a dialogue is cut before a question that nearly repeats one of them, which
    a teacher's follow-up may do. (ROUGE-L F above 0.7, as in Self-Instruct.)"""
    seed: int = 0

    def run(self, work: Work) -> None:
        rows = work.inputs[self.dialogues].rows()
        scores = self._scores(rows, work) if self.judge else {}
        held_out = work.inputs[self.apart_from].rows() if self.apart_from else []
        apart = Kept([row["instruction"] for row in held_out])
        kept: list[dict[str, Any]] = []
        seen: set[str] = set()
        for row in rows:
            messages = [dict(m) for m in row["messages"]]
            end = len(messages)
            for place in range(1, len(messages), 2):
                answer = messages[place]["content"]
                if held_out and apart.nearest(row["instructions"][place // 2]) > NEAR:
                    rule = "near a held-out prompt"
                elif not answer.strip():
                    rule = "empty answer"
                elif UNHELPFUL.search(answer):
                    rule = "unhelpful assistant"
                elif (score := scores.get(f"{row['id']}/{place}")) is None and self.judge:
                    rule = "answer not scored"
                elif score is not None and score < self.min_score:
                    rule = "answer below min_score"
                else:
                    self._true_case(messages[place - 1], row, place, work, is_answer=False)
                    self._true_case(messages[place], row, place, work, is_answer=True)
                    continue
                work.drop(rule, {"prompt": messages[place - 1]["content"], "answer": answer})
                end = place - 1
                break
            if end < 2:
                work.counts["dropped dialogues"] = work.counts.get("dropped dialogues", 0) + 1
                continue
            identity = " ".join(m["content"] for m in messages[:2]).casefold()
            if identity in seen:
                work.drop("duplicate", messages[0]["content"])
                continue
            seen.add(identity)
            kept.append({**row, "messages": messages[:end]})
        if not kept:
            why = [f"{n:.0f} {k.removeprefix('dropped/')}" for k, n in work.counts.items() if n]
            raise Permanent(
                f"stage '{work.name}': no dialogue is left ({', '.join(why)}); make more of them, "
                "or lower min_score"
            )
        work.write_rows(kept)

    def _scores(self, rows: list[dict[str, Any]], work: Work) -> dict[str, float | None]:
        """Scores by "<dialogue>/<place of the answer>"."""
        requests = [
            {
                "id": f"{row['id']}/{place}",
                "instruction": row["instructions"][place // 2],
                "prompt": row["messages"][place - 1]["content"],
                "constraint": row["constraint"],
                "completion": {
                    "text": row["messages"][place]["content"],
                    "finish_reason": row["finish"][place // 2],
                },
            }
            for row in rows
            for place in range(1, len(row["messages"]), 2)
        ]
        rated = run_rows(work, requests, rate, [work.models[str(self.judge)]], judge=True)
        return {row["id"]: row["score"] for row in rated}

    def _true_case(
        self, message: dict[str, str], row: dict[str, Any], place: int, work: Work, is_answer: bool
    ) -> None:
        """Mends capitals in place, unless the prompt asked for the casing as it is."""
        before = message["content"]
        after = true_case(before)
        if after == before:
            return
        if is_answer and row.get("constraint"):
            instruction = row["instructions"][place // 2]
            held = constraints.holds(row["constraint"], before, instruction)[0]
            if held and not constraints.holds(row["constraint"], after, instruction)[0]:
                return
        message["content"] = after
        work.counts["true-cased"] = work.counts.get("true-cased", 0) + 1
        examples = work.examples.setdefault("true-cased", [])
        if len(examples) < 3:
            examples.append([before, after])


async def rate(row: dict[str, Any], judge: Judge) -> dict[str, Any]:
    return {"id": row["id"], **await judge.score(row, row["completion"])}


def true_case(text: str) -> str:
    """Capital letters at the start of sentences and for the word "i".

    A text with no capital at all, or in capitals throughout, is a style and is left alone.
    """
    if text == text.lower() or text == text.upper():
        return text
    # "i in", "i is": a counter in code.
    text = re.sub(r"(?<![\w'’.])i(?=['’](?:m|ve|ll|d)\b|\s+(?!(?:in|is)\b)[a-z])", "I", text)
    return SENTENCE_START.sub(lambda found: found[0].upper(), text)
