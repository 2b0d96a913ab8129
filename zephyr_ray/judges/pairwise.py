"""Ranks two answers with the prompt format of AlpacaEval."""

from typing import Any, ClassVar

from zephyr_ray.judges.comparison import Comparison
from zephyr_ray.judges.inquiry import Format, Inquiry, object_schema
from zephyr_ray.judges.literal import number
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.verdict import Verdict, last_word

NAMES = ("model_1", "model_2")
WINNER = "model_with_rank_1"
"""The only key of a reply if the engine enforces the schema. A list of ranks could not be the root
of a schema, and could give both models the same rank."""


class Ranking(Comparison):
    """The form in which the judge ranks two outputs; a single order cannot be a tie."""

    name: ClassVar[str] = "pairwise"
    questions: ClassVar[tuple[Question, ...]] = (Question.shipped("pairwise"),)
    reply: ClassVar[Format] = Format(
        "[{'model': 'model_1', 'rank': ...}, {'model': 'model_2', 'rank': ...}]",
        max_tokens=128,
        schema=object_schema(**{WINNER: {"type": "string", "enum": list(NAMES)}}),
    )

    async def prefer(
        self, prompt: str, first: str, second: str, inquiry: Inquiry
    ) -> tuple[float | None, str]:
        [question] = self.questions
        judged = "\n".join([prompt, first, second])
        outputs = [
            {"model": name, "answer": output}
            for name, output in zip(NAMES, (first, second), strict=True)
        ]
        values = {"instruction": repr({"instruction": prompt}), "outputs": repr(outputs)}
        verdict, reply = await inquiry.put(
            question,
            values,
            self.reply,
            lambda text, cut: last_word(text, read_winner, judged, cut),
        )
        return None if verdict.says is None else float(verdict.says == 0), repr(reply)


def read_winner(value: Any) -> Verdict | None:
    """Returns a verdict with the index (0 or 1) of the output that has rank 1."""
    if isinstance(value, dict) and set(value) == {WINNER}:
        if value[WINNER] in NAMES:
            return Verdict(NAMES.index(value[WINNER]))
        return Verdict(None, fault=f'its "{WINNER}" is neither {" nor ".join(NAMES)}')
    entries = value if isinstance(value, list) else []
    if not entries or not all(isinstance(e, dict) and "rank" in e for e in entries):
        return None
    by_rank = {number(e["rank"]): e.get("model") for e in entries}
    order = [by_rank.get(1), by_rank.get(2)]
    if len(entries) != 2 or sorted(map(str, order)) != list(NAMES):
        return Verdict(None, fault="its ranks are not 1 for one model and 2 for the other")
    return Verdict(order.index("model_1"))
