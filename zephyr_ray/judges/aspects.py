"""Rates the answers to one prompt together, one aspect per question, as UltraFeedback does."""

import random
from functools import partial
from typing import Any, ClassVar

from zephyr_ray.demand import Calls
from zephyr_ray.formatting import number, shorten
from zephyr_ray.judges.form import Answer, Judgement, Rating, Row
from zephyr_ray.judges.inquiry import Format, Inquiry, at_once, object_schema
from zephyr_ray.judges.marks import between_marks
from zephyr_ray.judges.question import Question
from zephyr_ray.judges.rating import describe_fault, read_rating, whole_numbers
from zephyr_ray.judges.verdict import Read, Verdict, last_word
from zephyr_ray.published_feedback import ASPECTS

HIGHEST = 5
MAY_NOT_APPLY = ("honesty",)
"""Aspects that do not apply to some answers."""
NOT_APPLICABLE = ("n/a", "na", "not applicable")
QUESTION_TOKENS = 320
"""Tokens of the instructions per question, for estimates."""
FIXED_TOKENS, TOKENS_PER_ANSWER = 96, 160
"""Maximum tokens per reply: a fixed number, and a number per judged answer."""


class Aspects:
    """The form for any number of answers to one prompt:
    `{"aspects": per answer, by aspect, "unparsable": replies}`.

    An aspect of an answer has a `rating` (1 to 5, None if it does not apply), a `rationale` and the
    answer's `position` in the question. The order of the answers is random per aspect, seeded with
    the row's `order_seed` (by default, its prompt). Aspects whose reply cannot be parsed
    are omitted.
    """

    name: ClassVar[str] = "aspects"
    fields: ClassVar[tuple[str, ...] | None] = None
    questions: ClassVar[tuple[Question, ...]] = tuple(
        Question.shipped(f"aspects/{aspect}") for aspect in ASPECTS
    )
    rates: ClassVar[tuple[str, ...]] = ASPECTS
    highest: ClassVar[int] = HIGHEST

    async def judge(self, row: Row, answers: list[Answer], inquiry: Inquiry) -> Judgement:
        rated: list[dict[str, Any]] = [{} for _ in answers]
        unparsable = []
        judged = "\n".join([row["prompt"], *(answer["text"] for answer in answers)])
        orders = {
            aspect: shuffled(len(answers), f"{row.get('order_seed') or row['prompt']}/{aspect}")
            for aspect in ASPECTS
        }

        async def ask(aspect: str, question: Question) -> tuple[Verdict, str]:
            texts = [answers[index]["text"] for index in orders[aspect]]
            shown = between_marks(dict(zip(_names(len(texts)), texts, strict=True)))
            values = {"prompt": row["prompt"], "answers": shown}
            parse = partial(read_ratings, aspect=aspect, answers=len(answers), judged=judged)
            return await inquiry.put(question, values, reply_format(aspect, len(answers)), parse)

        replies = await at_once(*map(ask, ASPECTS, self.questions))
        for (aspect, order), (verdict, reply) in zip(orders.items(), replies, strict=True):
            if verdict.says is None:
                unparsable.append(f"{aspect}: unparsable: {reply!r}")
                continue
            ratings = zip(order, verdict.says, verdict.reason, strict=True)
            for position, (index, rating, rationale) in enumerate(ratings, 1):
                facts = {"rating": rating, "rationale": rationale, "position": position}
                rated[index][aspect] = facts
        return {"aspects": rated, "unparsable": unparsable}

    def calls(self, judgements: float, prompt: int, answer: int, answers: float = 1) -> Calls:
        count = judgements * len(ASPECTS)
        tokens_in = QUESTION_TOKENS + prompt + answers * answer
        tokens_out = FIXED_TOKENS + TOKENS_PER_ANSWER * answers
        return Calls(count, count * tokens_in, count * tokens_out)

    def ratings(self, judgement: Judgement) -> list[dict[str, Rating]]:
        return [
            {name: Rating(a["rating"], a["position"]) for name, a in aspects.items()}
            for aspects in judgement["aspects"]
        ]

    def columns(self, judgement: Judgement) -> list[dict[str, Any]]:
        """Returns the columns of each answer. They have no aspects if one cannot be parsed, because
        a mean of the others would favor answers that are weak in it."""
        reason = shorten("; ".join(judgement["unparsable"]))
        rated = [None if reason else aspects for aspects in judgement["aspects"]]
        return [
            {"score": mean_rating(aspects), "reason": reason, "checks": {}, "aspects": aspects}
            for aspects in rated
        ]

    def words(self, columns: dict[str, Any]) -> list[str]:
        words = []
        for name, aspect in (columns.get("aspects") or {}).items():
            rating = "N/A" if aspect["rating"] is None else number(aspect["rating"], 0)
            words.append(f"{name.replace('_', ' ').capitalize()} {rating}: {aspect['rationale']}")
        return words


def mean_rating(aspects: dict[str, Any] | None) -> float | None:
    """Returns the mean of an answer's ratings without those that do not apply; None if none
    applies or there are no aspects."""
    ratings = [a["rating"] for a in (aspects or {}).values() if a["rating"] is not None]
    return sum(ratings) / len(ratings) if ratings else None


def shuffled(count: int, seed: str) -> list[int]:
    """Returns 0 to `count` - 1 in a random order that depends on the seed alone."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def reply_format(aspect: str, answers: int) -> Format:
    """Returns the format of the reply about this number of answers."""
    scale = f"a whole number from 1 (worst) to {HIGHEST} (best)"
    values = whole_numbers(HIGHEST)
    if aspect in MAY_NOT_APPLY:
        scale += ' or "N/A"'
        values = {"anyOf": [values, {"type": "string", "enum": ["N/A"]}]}
    rated = f'{{"rationale": "one sentence", "rating": {scale}}}'
    schema = object_schema(rationale={"type": "string"}, rating=values)
    names = _names(answers)
    entries = ", ".join(f'"{name}": {rated}' for name in names)
    return Format(
        f"{{{entries}}}",
        max_tokens=FIXED_TOKENS + TOKENS_PER_ANSWER * answers,
        schema=object_schema(**dict.fromkeys(names, schema)),
    )


def read_ratings(
    text: str, cut: bool = False, *, aspect: str, answers: int, judged: str = ""
) -> Verdict:
    """Returns a rating per answer (1 to 5, None if the aspect does not apply), and the rationales;
    see `last_word`."""
    return last_word(text, _reader(aspect, answers), judged, cut)


def _reader(aspect: str, answers: int) -> Read:
    names = _names(answers)

    def read(value: Any) -> Verdict | None:
        if not isinstance(value, dict) or not set(names) & set(value):
            return None
        if wrong := sorted(set(names) ^ set(value)):
            why = "is missing" if wrong[0] in names else "is not an answer"
            return Verdict(None, fault=f'its "{shorten(wrong[0], 40)}" {why}')
        ratings, rationales = [], []
        for name in names:
            entry = value[name] if isinstance(value[name], dict) else {}
            given = entry.get("rating")
            rating = read_rating(given, HIGHEST)
            may_skip = aspect in MAY_NOT_APPLY and str(given).strip().lower() in NOT_APPLICABLE
            if rating is None and not may_skip:
                fault = describe_fault("rating", given, HIGHEST)
                return Verdict(None, fault=f'in "{name}", {fault}')
            ratings.append(rating)
            rationales.append(str(entry.get("rationale") or ""))
        return Verdict(tuple(ratings), tuple(rationales))

    return read


def _names(answers: int) -> list[str]:
    return [f"answer_{number}" for number in range(1, answers + 1)]
