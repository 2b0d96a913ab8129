"""Scores one answer of a conversation from 1 to 10 as `[[n]]`, as MT-Bench does."""

from typing import Any, ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.judges.form import QUESTION_TOKENS, Answer, Judgement, Row
from zephyr_ray.judges.inquiry import Format, Inquiry, object_schema
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.rating import describe_fault, read_rating, whole_numbers
from zephyr_ray.judges.score import HIGHEST
from zephyr_ray.judges.verdict import Verdict, last_word

OPEN = Question.shipped("turn_score")
"""The question about an answer without a reference."""
REFERENCED = Question.shipped("turn_score/reference")
"""The question about an answer with a reference, which the judge is shown."""


class TurnScore:
    """The form for one answer: `{"score": 1-10 or None, "reason": text}`.

    The prompt of the row is the last question, after the earlier turns if there are any. The row
    may have a `reference`: correct answers to show to the judge.
    """

    name: ClassVar[str] = "turn_score"
    fields: ClassVar[tuple[str, ...] | None] = ("completion",)
    questions: ClassVar[tuple[Question, ...]] = (OPEN, REFERENCED)
    reply: ClassVar[Format] = Format(
        f"[[n]], where n is a whole number from 1 (worst) to {HIGHEST} (best)",
        max_tokens=512,
        # Endpoints accept only schemas of objects, so they ignore this one, and their judges reply
        # as in MT-Bench. vLLM, whose judge may be weak, enforces the object.
        schema={
            "anyOf": [object_schema(explanation={"type": "string"}, rating=whole_numbers(HIGHEST))]
        },
    )

    async def judge(self, row: Row, answers: list[Answer], inquiry: Inquiry) -> Judgement:
        [answer] = answers
        values = {"prompt": row["prompt"], "answer": answer["text"]}
        question = OPEN
        if row.get("reference"):
            question, values["reference"] = REFERENCED, row["reference"]
        judged = "\n".join(values.values())

        def parse(reply: str, cut: bool) -> Verdict:
            return last_word(reply, read_score, judged, cut)

        verdict, reply = await inquiry.put(question, values, self.reply, parse)
        if verdict.says is None:
            return {"score": None, "reason": f"unparsable: {reply!r}"}
        return {"score": verdict.says, "reason": verdict.reason or reply}

    def calls(self, judgements: float, prompt: int, answer: int) -> Calls:
        tokens = QUESTION_TOKENS + prompt + answer
        return Calls(judgements, judgements * tokens, judgements * self.reply.max_tokens)


def read_score(value: Any) -> Verdict | None:
    """Returns the verdict of `[[n]]`, or of an object with a rating."""
    match value:
        case [[str(score)]] | {"rating": str(score)}:
            rating = read_rating(score, HIGHEST)
            if rating is None:
                return Verdict(None, fault=describe_fault("rating", score, HIGHEST))
            explanation = value.get("explanation") if isinstance(value, dict) else None
            return Verdict(rating, str(explanation or ""))
    return None
