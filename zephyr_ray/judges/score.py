"""Scores one answer from 1 to 10, with a reason in one sentence."""

from typing import Any, ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.judges.form import QUESTION_TOKENS, Answer, Judgement, Rating, Row
from zephyr_ray.judges.inquiry import Format, Inquiry, object_schema
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.rating import describe_fault, read_rating, whole_numbers
from zephyr_ray.judges.verdict import Read, Verdict, last_word

HIGHEST = 10


class Score:
    """The form for one answer: `{"score": 1-10 or None, "reason": text, "checks": {}}`."""

    name: ClassVar[str] = "score"
    fields: ClassVar[tuple[str, ...] | None] = ("completion",)
    questions: ClassVar[tuple[Question, ...]] = (Question.shipped("score"),)
    rates: ClassVar[tuple[str, ...]] = ("score",)
    highest: ClassVar[int] = HIGHEST
    reply: ClassVar[Format] = Format(
        '{"rationale": "one sentence", "score": a whole number from 1 (worst) to 10 (best)}',
        max_tokens=256,
        schema=object_schema(rationale={"type": "string"}, score=whole_numbers(HIGHEST)),
    )
    keys: ClassVar[tuple[str, str]] = ("score", "rationale")
    """Keys of the score and its reason in a reply."""
    question_tokens: ClassVar[int] = QUESTION_TOKENS

    async def judge(self, row: Row, answers: list[Answer], inquiry: Inquiry) -> Judgement:
        [answer] = answers
        [question] = self.questions
        prompt, text = row["prompt"], answer["text"]

        def parse(reply: str, cut: bool) -> Verdict:
            return last_word(reply, score_reader(*self.keys), f"{prompt}\n{text}", cut)

        values = {"prompt": prompt, "answer": text}
        verdict, reply = await inquiry.put(question, values, self.reply, parse)
        return {"score": verdict.says, "reason": _reason(verdict, reply), "checks": {}}

    def calls(self, judgements: float, prompt: int, answer: int, answers: float = 1) -> Calls:
        tokens = self.question_tokens + prompt + answer
        return Calls(judgements, judgements * tokens, judgements * self.reply.max_tokens)

    def ratings(self, judgement: Judgement) -> list[dict[str, Rating]]:
        score = judgement["score"]
        return [{} if score is None else dict.fromkeys(self.rates, Rating(score))]

    def columns(self, judgement: Judgement) -> list[dict[str, Any]]:
        return [{name: judgement[name] for name in ("score", "reason", "checks")}]

    def words(self, columns: dict[str, Any]) -> list[str]:
        return [columns["reason"]]


def score_reader(key: str, reason: str) -> Read:
    """Returns the reader of objects with a score from 1 to 10 and its reason under these keys."""

    def read(value: Any) -> Verdict | None:
        if not isinstance(value, dict) or key not in value:
            return None
        score = read_rating(value[key], HIGHEST)
        if score is None:
            return Verdict(None, fault=describe_fault(key, value[key], HIGHEST))
        return Verdict(score, str(value.get(reason) or ""))

    return read


def _reason(verdict: Verdict, reply: str) -> str:
    return f"unparsable: {reply!r}" if verdict.says is None else verdict.reason
