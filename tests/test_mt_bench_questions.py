"""Tests two-turn questions: the shipped ones, whose references are recomputed here, MT-Bench's, and
faulty files."""

import itertools
import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.mt_bench_answers import MtBenchAnswers
from zephyr_ray.judge.mt_bench_questions import (
    COUNTS,
    REFERENCED,
    SHIPPED,
    TEMPERATURES,
    QuestionSet,
    fetch_questions,
    read_questions,
)

QUESTION = {"question_id": 1, "category": "math", "turns": ["What is 2 + 2?", "And 3 + 3?"]}


def shipped(category: str, number: int) -> dict[str, Any]:
    return [q for q in read_questions(SHIPPED) if q["category"] == category][number]


def code(text: str) -> dict[str, Any]:
    """Returns the names that the Python block of a text defines."""
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block
    names: dict[str, Any] = {}
    exec(block[1], names)
    return names


def test_two_questions_per_category_are_shipped_with_references_where_needed() -> None:
    questions = read_questions(SHIPPED)
    assert Counter(q["category"] for q in questions) == dict.fromkeys(TEMPERATURES, 2)
    assert {q["category"] for q in questions if q["reference"]} == set(REFERENCED)
    assert sum(q["reference"] is not None for q in questions) == 6


def test_the_order_of_the_race() -> None:
    names = ("Ada", "Ben", "Cem", "Dora", "Eli")

    def orders(is_cem_last: bool) -> list[str]:
        matching = []
        for order in itertools.permutations(names):
            place = {name: index for index, name in enumerate(order)}
            if (
                place["Ben"] == place["Dora"] + 1
                and place["Eli"] < place["Ada"] < place["Cem"]
                and place["Dora"] != 0
                and (place["Cem"] == 4) == is_cem_last
            ):
                matching.append(", ".join(order))
        return matching

    first, second = shipped("reasoning", 0)["reference"]
    [only] = orders(is_cem_last=False)
    assert f"The order is {only}." in first
    two = orders(is_cem_last=True)
    assert len(two) == 2 and all(order in second for order in two)


def test_which_siblings_lie() -> None:
    consistent = []
    for lena, max_, nora, oskar in itertools.product((True, False), repeat=4):
        lies = [lena, max_, nora].count(False)
        if lena == (lies == 1) and max_ == (not lena) and nora == (max_ == nora):
            consistent.append((lena, max_, nora, oskar == ((lies + (not oskar)) % 2 == 0)))
    # Oskar's statement is consistent whether he lies or tells the truth.
    assert consistent == [(False, True, False, True)] * 2
    first, second = shipped("reasoning", 1)["reference"]
    assert first.startswith("Max tells the truth; Lena and Nora lie.")
    assert second.startswith("Nothing follows about Oskar.")


def test_the_tank() -> None:
    per_hour, loss = 240 / 6, 240 / 10
    hours = 3 + (240 - 3 * (per_hour - loss)) / per_hour
    together = (7 * per_hour - 240) / loss
    first, second = shipped("math", 0)["reference"]
    assert hours == 7.8 and "7.8 hours, that is 7 hours and 48 minutes" in first
    assert together == 5 / 3 and "5/3 hours, that is 1 hour and 40 minutes" in second


def test_the_numbers_divisible_by_6_but_not_by_4() -> None:
    numbers = [n for n in range(1, 1000) if n % 6 == 0 and n % 4]
    first, second = shipped("math", 1)["reference"]
    assert f"There are {len(numbers)}." in first and f"The sum is {sum(numbers)}." in second


def runs(values: list[int], tolerance: int) -> tuple[int, int]:
    """Returns the longest run by comparing all stretches."""
    stretches = [
        (start, end - start)
        for start in range(len(values))
        for end in range(start + 1, len(values) + 1)
        if all(abs(value - values[start]) <= tolerance for value in values[start:end])
    ]
    return max(stretches, key=lambda s: (s[1], -s[0]), default=(0, 0))


def test_the_longest_run() -> None:
    question = shipped("coding", 0)
    first, second = (code(reference)["longest_run"] for reference in question["reference"])
    for length in range(5):
        for values in map(list, itertools.product(range(4), repeat=length)):
            assert first(values) == second(values) == runs(values, 0)
            assert second(values, 1) == runs(values, 1)
    assert second([1, 2, 3, 2, 9, 9], 1) == (1, 3)
    assert "[1, 2, 3, 2, 9, 9] and a tolerance of 1" in question["turns"][1]
    assert question["reference"][1].startswith("It returns (1, 3)")


def test_the_median() -> None:
    question = shipped("coding", 1)
    faulty = code(question["turns"][0])["median"]
    median = code(question["reference"][0])["median"]
    for length in range(1, 5):
        for values in map(list, itertools.product(range(4), repeat=length)):
            before = list(values)
            assert median(values) == statistics.median(values) and values == before
    assert (faulty([4, 1, 3, 2]), median([4, 1, 3, 2]), median([2, 1])) == (5.0, 2.5, 1.5)
    with pytest.raises(IndexError):
        faulty([2, 1])
    reference = question["reference"][1]
    assert "5.0 for [4, 1, 3, 2]" in reference and "returns 2.5 and 1.5" in reference


def test_the_questions_of_mt_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path))
    stage = MtBenchAnswers(models=["m"], questions="mt_bench")
    stage.preflight()
    questions = read_questions(fetch_questions(QuestionSet.MT_BENCH))
    assert len(questions) == COUNTS[QuestionSet.MT_BENCH] == stage.expected({}) == 80
    assert Counter(q["category"] for q in questions) == dict.fromkeys(TEMPERATURES, 10)
    referenced = Counter(q["category"] for q in questions if q["reference"])
    assert referenced == dict.fromkeys(REFERENCED, 10)
    by_id = {q["id"]: q for q in questions}
    assert set(by_id) == set(map(str, range(81, 161)))
    # GPT-4's reference wrongly says Cheryl; this one is GPT-4 Turbo's.
    assert "secretary is Alice" in by_id["105"]["reference"][0]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question_id": None}, 'line 1: needs a "question_id", a number or text; add one'),
        ({"question_id": True}, 'line 1: needs a "question_id", a number or text; add one'),
        ({"category": " "}, 'line 1: needs a "category" that is text; add one'),
        ({"category": 7}, 'line 1: needs a "category" that is text; add one'),
        ({"turns": ["One?"]}, 'line 1: "turns" is not a list of 2 texts; write 2 turns'),
        ({"turns": ["One?", " "]}, 'line 1: "turns" is not a list of 2 texts'),
        ({"reference": ["4"]}, 'line 1: "reference" is not a list of 2 texts; write one per turn'),
        ({"reference": "4"}, 'line 1: "reference" is not a list of 2 texts'),
    ],
)
def test_a_faulty_question_is_one_line(row: dict[str, Any], line: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(QUESTION | row))
    with pytest.raises(Permanent) as error:
        MtBenchAnswers(models=["m"], questions="mine.jsonl").check({"questions": file}, {})
    assert line in str(error.value)


def test_a_repeated_id_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{json.dumps(QUESTION)}\n\n{json.dumps(QUESTION)}\n")
    with pytest.raises(Permanent, match="line 3: repeats the question_id of line 1"):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(Permanent, match="is empty"):
        read_questions(file)
