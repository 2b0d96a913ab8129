"""Cleans dialogues as Zephyr cleaned UltraChat; counts each rule and keeps examples of it."""

import re
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent
from zephyr_ray.judges import FORMS
from zephyr_ray.messages import Message, answers, exchanges, with_facts
from zephyr_ray.models import constraints
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.similarity import SimilarityIndex
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work

NEAR = 0.7
"""ROUGE-L F above which a question is a near duplicate of a held-out prompt (Self-Instruct)."""

UNHELPFUL = re.compile(
    r"\b(?:i|as an? (?:ai|language model|chatbot|assistant)[^.!?]{0,40})\b[^.!?]{0,30}?"
    r"(?:(?:do not|don['’]t|cannot|can['’]t|am (?:unable|not able) to) "
    r"(?:have|possess|feel|hold|experience|form|offer|express)|have no)\b[^.!?]{0,20}?"
    r"\b(?:personal (?:experience|opinion|emotion|feeling|belief|preference)s?"
    r"|emotions|feelings|opinions)\b",
    re.IGNORECASE,
)
"""Matches an assistant that denies having experiences, emotions or opinions."""


SENTENCE_START = re.compile(
    r"(?:\A|(?<=[a-z]{2}[.!?][ \n])(?<!etc\.[ \n])(?<!vs\.[ \n])(?<!approx\.[ \n]))"
    r"[a-z](?=[a-z'’-]*[,.!?:;]*(?:\s|\Z))"
)
"""Matches a lowercase letter after the end of a sentence, in an all-lowercase word (no iPhone, no
URL). A single letter before the full stop is an abbreviation ("e.g. this")."""


class Clean(RowStage):
    """A stage that cuts each dialogue before its first bad answer; drops it if no answer
    remains."""

    kind = "clean"
    makes = "dialogues"
    version = 2

    dialogues: Annotated[str, Reads("dialogues")]
    judge: Annotated[str | None, Reads("judge", form="score")] = None
    """A judge of answers; those that it scores below `min_score` are bad."""
    min_score: float = Field(10.0, ge=1, le=10)
    """Minimum score of an answer; unused without a judge."""
    apart_from: Annotated[str | None, Reads("prompts")] = None
    """Held-out prompts. A dialogue is cut before a question that is a near duplicate of one of
    them, because the teacher's follow-up questions may repeat them."""
    seed: int = 0

    def run(self, work: Work) -> None:
        rows = [with_facts(row) for row in work.inputs[self.dialogues].rows()]
        scores = self._scores(rows, work) if self.judge else {}
        prompts = work.inputs[self.apart_from].rows() if self.apart_from else []
        held_out = SimilarityIndex([row["instruction"] for row in prompts])
        cleaned: list[dict[str, Any]] = []
        seen: set[str] = set()
        for row in rows:
            messages = self._cut(row, scores, held_out, work)
            if not answers(messages):
                work.counts["dropped dialogues"] = work.counts.get("dropped dialogues", 0) + 1
                continue
            [first, *_] = exchanges(messages)
            identity = " ".join(m["content"] for m in messages[: first[1] + 1]).casefold()
            if identity in seen:
                work.drop("duplicate", messages[first[0]]["content"])
                continue
            seen.add(identity)
            cleaned.append({**row, "messages": messages})
        if not cleaned:
            reasons = [f"{n:.0f} {k.removeprefix('dropped/')}" for k, n in work.counts.items() if n]
            raise Permanent(
                f"stage '{work.name}': every dialogue was dropped ({', '.join(reasons)}); lower "
                "min_score or increase the number of prompts"
            )
        work.write_rows(cleaned)

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        return reads.get(self.dialogues)

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if self.judge is None or (dialogues := rows.get(self.dialogues)) is None:
            return {}
        answers_each, tokens = reads[self.dialogues].answer_bounds()
        return {self.judge: FORMS["score"].calls(dialogues * answers_each, PROMPT_TOKENS, tokens)}

    def _cut(
        self,
        row: dict[str, Any],
        scores: dict[str, float | None],
        held_out: SimilarityIndex,
        work: Work,
    ) -> list[Message]:
        """Returns the messages before the first question with a bad answer, true-cased."""
        messages = [dict(message) for message in row["messages"]]
        for question_index, answer_index in exchanges(messages):
            question, answer = messages[question_index], messages[answer_index]
            score = scores.get(f"{row['id']}/{answer_index}")
            rule = self._broken_rule(question, answer, score, held_out)
            if rule:
                work.drop(rule, {"prompt": question["content"], "answer": answer["content"]})
                return messages[:question_index]
            _correct_case(question, None, work)
            _correct_case(answer, (row.get("constraint"), _instruction(question)), work)
        return messages

    def _broken_rule(
        self, question: Message, answer: Message, score: float | None, held_out: SimilarityIndex
    ) -> str | None:
        """Returns the rule that the exchange breaks, or None."""
        if held_out.nearest(_instruction(question)) > NEAR:
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
                "id": f"{row['id']}/{answer}",
                "instruction": _instruction(row["messages"][question]),
                "prompt": row["messages"][question]["content"],
                "constraint": row["constraint"],
                "completion": {
                    "text": row["messages"][answer]["content"],
                    "finish_reason": row["messages"][answer].get("finish_reason", "stop"),
                },
            }
            for row in rows
            for question, answer in exchanges(row["messages"])
        ]
        rated = run_rows(work, requests, rate, [work.models[str(self.judge)]])
        return {row["id"]: row["score"] for row in rated}


def _instruction(question: Message) -> str:
    return question.get("instruction", question["content"])


def _correct_case(
    message: Message, task: tuple[dict[str, Any] | None, str] | None, work: Work
) -> None:
    """Corrects capitals in place, unless that breaks the constraint; `task` is the constraint and
    the instruction of an answer, None for a question."""
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
    work.counts["true-cased"] = work.counts.get("true-cased", 0) + 1
    examples = work.examples.setdefault("true-cased", [])
    if len(examples) < 3:
        examples.append([before, after])


async def rate(row: dict[str, Any], ask: Ask) -> dict[str, Any]:
    """Scores one answer."""
    return {"id": row["id"], **await ask.judge("score", row, [row["completion"]])}


def true_case(text: str) -> str:
    """Returns the text with capitals at the start of sentences and for the word "i".

    A text without any capital, or all in capitals, is a style and stays as it is.
    """
    if text == text.lower() or text == text.upper():
        return text
    # In "i in" and "i is", i is a variable in code.
    text = re.sub(r"(?<![\w'’.])i(?=['’](?:m|ve|ll|d)\b|\s+(?!(?:in|is)\b)[a-z])", "I", text)
    return SENTENCE_START.sub(lambda match: match[0].upper(), text)
