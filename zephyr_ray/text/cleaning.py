"""Cleans dialogues as Zephyr cleaned UltraChat; counts what each rule drops and keeps examples."""

from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent
from zephyr_ray.judges import FORMS, reply_tokens, unreadable
from zephyr_ray.messages import Exchange, Message, exchanges, visible, with_facts
from zephyr_ray.models import constraints
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.similarity import SimilarityIndex
from zephyr_ray.models.true_case import true_case
from zephyr_ray.models.unhelpful import is_unhelpful
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work

NEAR = 0.7
"""ROUGE-L F above which a question is a near duplicate of a held-out prompt (Self-Instruct)."""


class Clean(RowStage):
    """A stage that cuts each dialogue before its first bad exchange, and drops it if no answer
    remains."""

    kind = "clean"
    makes = "dialogues"
    version = 3

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
            answered = [exchange for exchange in exchanges(messages) if exchange.questions]
            if not answered:
                work.counts["dropped dialogues"] = work.counts.get("dropped dialogues", 0) + 1
                continue
            first = answered[0]
            identity = " ".join(m["content"] for m in messages[: first.answer + 1]).casefold()
            if identity in seen:
                work.drop("duplicate", _prompt(messages, first))
                continue
            seen.add(identity)
            cleaned.append({**row, "messages": messages})
        if not cleaned:
            reasons = [
                f"{count:.0f} {name.removeprefix('dropped/')}"
                for name, count in work.counts.items()
                if name.startswith("dropped/")
            ]
            lower = "lower min_score or " if self.judge else ""
            raise Permanent(
                f"stage '{work.name}': every dialogue was dropped ({', '.join(reasons)}); {lower}"
                "increase the number of prompts"
            )
        work.write_rows(cleaned)

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        return reads.get(self.dialogues)

    def answer_tokens(self) -> int:
        return reply_tokens("score") if self.judge else 0

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
        """Returns the messages before the first bad exchange, true-cased."""
        messages = [dict(message) for message in row["messages"]]
        end = 0
        for exchange in exchanges(messages):
            answer = messages[exchange.answer]
            score = scores.get(_score_id(row, exchange))
            rule = self._broken_rule(messages, exchange, score, held_out)
            if rule:
                prompt = _prompt(messages, exchange)
                work.drop(rule, {"prompt": prompt, "answer": answer["content"]})
                break
            instruction = _instruction(messages, exchange)
            for index in exchange.questions:
                _correct_case(messages[index], None, work)
            _correct_case(answer, (row.get("constraint"), instruction), work)
            end = exchange.answer + 1
        return messages[:end]

    def _broken_rule(
        self,
        messages: list[Message],
        exchange: Exchange,
        score: float | None,
        held_out: SimilarityIndex,
    ) -> str | None:
        """Returns the rule that the exchange breaks, or None."""
        questions = [messages[index] for index in exchange.questions]
        answer = messages[exchange.answer]["content"]
        if any(held_out.nearest(_bare(question)) > NEAR for question in questions):
            return "near a held-out prompt"
        if not visible(answer):
            return "empty answer"
        if is_unhelpful(answer):
            return "unhelpful assistant"
        if self.judge and questions and score is None:
            return "answer not scored"
        if self.judge and score is not None and score < self.min_score:
            return "answer below min_score"
        return None

    def _scores(self, rows: list[dict[str, Any]], work: Work) -> dict[str, float | None]:
        """Returns scores by "<dialogue>/<index of the answer>"."""
        requests = [
            {
                "id": _score_id(row, exchange),
                "instruction": _instruction(row["messages"], exchange),
                "prompt": _prompt(row["messages"], exchange),
                "constraint": row["constraint"],
                "completion": {
                    "text": row["messages"][exchange.answer]["content"],
                    "finish_reason": row["messages"][exchange.answer].get("finish_reason", "stop"),
                },
            }
            for row in rows
            for exchange in exchanges(row["messages"])
            if exchange.questions
        ]
        rated = run_rows(work, requests, rate, [work.models[str(self.judge)]], unreadable)
        return {row["id"]: row["score"] for row in rated}


def _score_id(row: dict[str, Any], exchange: Exchange) -> str:
    return f"{row['id']}/{exchange.answer}"


def _prompt(messages: list[Message], exchange: Exchange) -> str:
    return "\n".join(messages[index]["content"] for index in exchange.questions)


def _instruction(messages: list[Message], exchange: Exchange) -> str:
    return "\n".join(_bare(messages[index]) for index in exchange.questions)


def _bare(question: Message) -> str:
    """Returns the question without the sentence that states a constraint."""
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
