"""Reviews one answer: a critique and an overall score from 1 to 10, as UltraFeedback does."""

from typing import Any, ClassVar

from zephyr_ray.formatting import number
from zephyr_ray.judges.form import Judgement
from zephyr_ray.judges.inquiry import Format, object_schema
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.rating import whole_numbers
from zephyr_ray.judges.score import HIGHEST, Score


class Critique(Score):
    """The form for one answer: like `Score`, with the critique as the reason."""

    name: ClassVar[str] = "critique"
    questions: ClassVar[tuple[Question, ...]] = (Question.shipped("critique"),)
    rates: ClassVar[tuple[str, ...]] = ("overall",)
    reply: ClassVar[Format] = Format(
        '{"critique": "the review", "overall": a whole number from 1 (worst) to 10 (best)}',
        max_tokens=768,
        schema=object_schema(critique={"type": "string"}, overall=whole_numbers(HIGHEST)),
    )
    keys: ClassVar[tuple[str, str]] = ("overall", "critique")
    question_tokens: ClassVar[int] = 256

    def columns(self, judgement: Judgement) -> list[dict[str, Any]]:
        [columns] = super().columns(judgement)
        score = judgement["score"]
        critique = None if score is None else judgement["reason"]
        return [columns | {"overall": score, "critique": critique}]

    def words(self, columns: dict[str, Any]) -> list[str]:
        critique = columns.get("critique")
        return [f"Overall {number(columns['overall'], 0)}: {critique}"] if critique else []
