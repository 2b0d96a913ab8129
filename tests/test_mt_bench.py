"""Tests two-turn answers and their judgement: the temperature of each category, what the judge is
shown, and the figures by hand."""

import asyncio
from typing import Any

import pytest
from in_process import Scripted

from zephyr_ray.errors import RowError
from zephyr_ray.judge import mt_bench_answers, mt_bench_section
from zephyr_ray.judge.mt_bench_answers import answer_turns
from zephyr_ray.judge.mt_bench_figures import difference, estimate, summary
from zephyr_ray.judge.mt_bench_turns import TwoTurns
from zephyr_ray.judge.statistics import bootstrap
from zephyr_ray.models.contract import Reply
from zephyr_ray.section import Interval, Table

TURNS = ["What is 2 + 2?", "And twice that?"]
MATH = {"category": "math", "turns": TURNS, "reference": ["4", "8"]}
STORY = {"category": "writing", "turns": ["Tell a story.", "Shorten it."], "reference": None}


def said(*texts: str | None) -> list[dict[str, Any] | None]:
    made = {"finish_reason": "stop", "tokens": 3}
    return [None if text is None else {"text": text, **made} for text in texts]


# --- answers -------------------------------------------------------------------------------------


def answered(ask: Any, **question: Any) -> dict[str, Any]:
    row = {"id": "q/m", **MATH, **question}
    return asyncio.run(answer_turns(row, ask, max_tokens=9))


@pytest.mark.parametrize(
    ("category", "temperature"),
    [
        ("writing", 0.7),
        ("roleplay", 0.7),
        ("reasoning", 0.0),
        ("math", 0.0),
        ("coding", 0.0),
        ("extraction", 0.0),
        ("stem", 0.1),
        ("humanities", 0.1),
        ("law", None),
    ],
)
def test_the_temperature_of_a_category(category: str, temperature: float | None) -> None:
    ask = Scripted("4", "8")
    answered(ask, category=category)
    assert ask.temperatures == [temperature, temperature]


def test_the_second_turn_follows_the_first_answer() -> None:
    ask = Scripted("It is 4.", Reply("Eig", "length", 7, 1))
    assert answered(ask)["turns"] == [
        {"text": "It is 4.", "finish_reason": "stop", "tokens": 3},
        {"text": "Eig", "finish_reason": "length", "tokens": 1},
    ]
    assert [(messages, max_tokens) for messages, max_tokens, _ in ask.requests] == [
        ([{"role": "user", "content": TURNS[0]}], 9),
        (
            [
                {"role": "user", "content": TURNS[0]},
                {"role": "assistant", "content": "It is 4."},
                {"role": "user", "content": TURNS[1]},
            ],
            9,
        ),
    ]


class Full:
    """A model whose context has room for this many answers; `asked` counts requests."""

    def __init__(self, answers: int):
        self.answers, self.asked = answers, 0

    async def __call__(self, *_: Any, **__: Any) -> Reply:
        self.asked += 1
        if self.asked > self.answers:
            raise RowError("prompt of 99 tokens", "too long")
        return Reply("Four.", "stop")


def test_a_second_turn_without_room_leaves_the_first_answer() -> None:
    made = answered(Full(answers=1))
    assert [turn and turn["text"] for turn in made["turns"]] == ["Four.", None]
    fault = mt_bench_answers._flaw(made, max_tokens=9)
    assert fault and (str(fault), fault.cause) == ("prompt of 99 tokens", "too long")
    with pytest.raises(RowError, match="prompt of 99 tokens"):
        answered(Full(answers=0))


# --- what the judge is asked ---------------------------------------------------------------------


def requests(baseline: str | None = None, **answers: Any) -> dict[str, dict[str, Any]]:
    gathered = TwoTurns(
        questions={"q1": MATH, "q2": STORY},
        answers={model: {"q1": said(*own), "q2": said(*own)} for model, own in answers.items()},
    )
    return {row["id"]: row for row in gathered.requests(baseline)}


def test_the_judge_sees_the_turns_before_the_one_it_scores() -> None:
    asked = requests(m=("Four.", "Eight."))
    assert list(asked) == ["q1/1/m", "q1/2/m", "q2/1/m", "q2/2/m"]
    first, second = asked["q1/1/m"], asked["q1/2/m"]
    assert first["prompt"] == "What is 2 + 2?"
    assert second["prompt"] == (
        "User:\nWhat is 2 + 2?\n\nAssistant:\nFour.\n\nUser:\nAnd twice that?"
    )
    assert [[a["text"] for a in row["answers"]] for row in (first, second)] == [
        ["Four."],
        ["Eight."],
    ]
    assert {row["form"] for row in asked.values()} == {"turn_score"}


def test_the_judge_gets_the_references_up_to_the_turn() -> None:
    asked = requests(m=("Four.", "Eight."))
    assert asked["q1/1/m"]["reference"] == "4"
    assert asked["q1/2/m"]["reference"] == "First turn:\n4\n\nSecond turn:\n8"
    assert asked["q2/1/m"]["reference"] is None and asked["q2/2/m"]["reference"] is None


def test_a_comparison_shows_both_conversations() -> None:
    asked = requests("base", base=("Five.", "Ten."), m=("Four.", "Eight."))
    assert list(asked) == ["q1/1/m", "q1/2/m", "q2/1/m", "q2/2/m"]
    first, second = asked["q1/1/m"], asked["q1/2/m"]
    assert [a["text"] for a in first["answers"]] == ["Four.", "Five."]
    assert [a["text"] for a in second["answers"]] == [
        "First turn:\nFour.\n\nSecond turn:\nEight.",
        "First turn:\nFive.\n\nSecond turn:\nTen.",
    ]
    assert all(turn in second["prompt"] for turn in TURNS)
    assert first["prompt"].endswith("A right solution, to compare the answers with:\n4")
    assert asked["q2/1/m"]["prompt"] == "Tell a story."


def test_a_missing_answer_is_not_judged() -> None:
    assert "q1/2/m" not in requests(m=("Four.", None))
    assert "q1/2/m" not in requests("base", base=("Five.", None), m=("Four.", "Eight."))
    assert "q1/1/m" in requests("base", base=("Five.", None), m=("Four.", "Eight."))


def test_two_empty_answers_are_not_compared() -> None:
    asked = requests("base", base=("Five.", " "), m=("", "\n"))
    assert list(asked) == ["q1/1/m", "q2/1/m"]
    # Without a baseline, an empty answer is scored too.
    assert list(requests(m=("", "Eight."))) == ["q1/1/m", "q1/2/m", "q2/1/m", "q2/2/m"]


# --- figures -------------------------------------------------------------------------------------


def judgement(question: str, turn: int, score: float | None, category: str) -> dict[str, Any]:
    return {"question": question, "turn": turn, "category": category, "score": score}


QUESTIONS = {
    "q1": MATH,
    "q2": MATH,
    "q3": STORY,
}
ROWS = [
    judgement("q1", 1, 8, "math"),
    judgement("q1", 2, 5, "math"),
    judgement("q2", 1, 2, "math"),
    judgement("q2", 2, None, "math"),
    judgement("q3", 1, 9, "writing"),
]


def test_figures_by_hand() -> None:
    figures = summary(ROWS, QUESTIONS, seed=1)
    assert figures["overall"]["mean"] == 6.0  # (8 + 5 + 2 + 9) / 4: unparsable replies do not count
    assert figures["turns"]["1"]["mean"] == pytest.approx(19 / 3)
    assert figures["turns"]["2"]["mean"] == 5.0
    assert list(figures["categories"]) == ["writing", "math"]
    assert figures["categories"]["math"]["mean"] == 5.0  # (8 + 5 + 2) / 3
    assert figures["categories"]["writing"]["mean"] == 9.0
    assert (figures["asked"], figures["read"]) == (6, 4)
    assert (figures["unparsable"], figures["missing"]) == (1, 1)
    assert summary([], QUESTIONS, seed=1)["overall"] is None


def test_both_turns_of_a_question_are_one_cluster() -> None:
    scores = [3, 9, 4, 10, 6, 2]
    rows = [judgement(f"q{n}", t, s, "stem") for n, s in enumerate(scores) for t in (1, 2)]
    made = estimate(rows, seed=5)
    assert made is not None
    by_question = bootstrap(scores, 5)
    assert (made["mean"], made["low"], made["high"]) == pytest.approx(by_question)
    as_if_independent = bootstrap([s for s in scores for _ in (1, 2)], 5)
    assert made["high"] - made["low"] > 1.2 * (as_if_independent[2] - as_if_independent[1])


def test_a_difference_pairs_the_turns_that_both_models_have() -> None:
    better = [row | {"score": row["score"] and row["score"] + 1} for row in ROWS]
    other = [judgement("q1", 1, 6, "math"), judgement("q3", 1, 9, "writing")]
    assert difference(better, ROWS, seed=0) == {
        "mean": 1.0,
        "low": 1.0,
        "high": 1.0,
        "judgements": 4,
        "questions": 3,
    }
    made = difference(ROWS, other, seed=0)
    assert made and (made["mean"], made["judgements"]) == (1.0, 2)  # (8 − 6 + 9 − 9) / 2
    assert difference(ROWS, [judgement("q9", 1, 1, "math")], seed=0) is None
    assert difference(ROWS, [judgement("q1", 1, None, "math")], seed=0) is None


def test_a_mean_over_one_question_has_no_interval() -> None:
    assert mt_bench_section._cell(estimate(ROWS[:2], seed=0)) == 6.5
    assert isinstance(mt_bench_section._cell(estimate(ROWS[:3], seed=0)), Interval)
    assert mt_bench_section._cell(None) is None


@pytest.mark.parametrize(("baseline", "measure"), [(None, "score"), ("base", "win rate")])
def test_differences_are_named_after_what_was_measured(baseline: str | None, measure: str) -> None:
    difference = {"a": "dpo", "b": "sft", "mean": 0.1, "low": 0.0, "high": 0.2}
    [table] = mt_bench_section._differences({"baseline": baseline, "differences": [difference]})
    assert isinstance(table, Table)
    assert table.title == f"Differences in {measure}, on the same turns"
