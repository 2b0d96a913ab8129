"""Tests the seed files: counts, schema, near-duplicates, and constraints of demonstrations."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import run, work_on
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist

from zephyr_ray.models.constraints import DEFAULT_KINDS, KINDS, holds, validate
from zephyr_ray.models.repetition import loops
from zephyr_ray.text.prompts import Prompts

SEEDS = Path(__file__).parents[1] / "configs" / "seeds"
NEAR = 0.7  # minimum ROUGE-L F of near-duplicate instructions
CATEGORIES = {
    *("advice", "classify", "compare", "describe", "explain", "greeting"),
    *("howto", "list", "maths", "rewrite", "story", "suggest"),
}


def rows(name: str) -> list[dict[str, Any]]:
    lines = (SEEDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


TRAIN, HELDOUT, DEMONSTRATIONS = rows("train"), rows("heldout"), rows("demonstrations")


def test_counts() -> None:
    assert (len(TRAIN), len(HELDOUT), len(DEMONSTRATIONS)) == (100, 600, 30)
    assert sum("constraint" in row for row in TRAIN) == 24


@pytest.mark.parametrize(
    ("tasks", "prefix", "optional"), [(TRAIN, "seed", {"constraint"}), (HELDOUT, "heldout", set())]
)
def test_schema(tasks: list[dict], prefix: str, optional: set[str]) -> None:
    assert [row["id"] for row in tasks] == [f"{prefix}-{n + 1:03}" for n in range(len(tasks))]
    for row in tasks:
        assert row.keys() - optional == {"id", "instruction", "category"}
        assert 4 <= len(words(row["instruction"])) <= 20, row
        assert row["instruction"] == row["instruction"].strip()
    assert {row["category"] for row in tasks} == CATEGORIES


def test_no_instruction_is_a_near_duplicate_of_another_in_any_file() -> None:
    texts = [row["instruction"] for row in TRAIN + HELDOUT + DEMONSTRATIONS]
    # On word lists, the normalized Indel similarity is ROUGE-L F.
    likeness = cdist(
        [words(text) for text in texts],
        [words(text) for text in texts],
        scorer=Indel.normalized_similarity,
    )
    np.fill_diagonal(likeness, 0)
    first, second = np.unravel_index(likeness.argmax(), likeness.shape)
    assert likeness.max() < NEAR, (texts[first], texts[second])


def test_seed_constraints_are_valid_and_not_asked_for_in_the_instruction() -> None:
    for row in TRAIN:
        if "constraint" not in row:
            continue
        constraint = row["constraint"]
        validate(constraint)
        for phrasing in KINDS[constraint["kind"]].phrasings:
            assert phrasing.format(**constraint) not in row["instruction"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prompts_made_from_the_seed_tasks_have_constraints_of_every_kind(
    seed: int, tmp_path: Path
) -> None:
    work = replace(work_on(tmp_path), files={"seeds": SEEDS / "train.jsonl"})
    made = run(Prompts(seeds="train.jsonl", seed=seed), work)
    assert {row["constraint"]["kind"] for row in made} == set(DEFAULT_KINDS)


def test_two_demonstrations_of_every_kind_with_different_arguments() -> None:
    assert Counter(row["constraint"]["kind"] for row in DEMONSTRATIONS) == dict.fromkeys(
        DEFAULT_KINDS, 2
    )
    for kind in DEFAULT_KINDS:
        one, two = (
            row["constraint"] for row in DEMONSTRATIONS if row["constraint"]["kind"] == kind
        )
        assert one != two or not KINDS[kind].values


@pytest.mark.parametrize("row", DEMONSTRATIONS, ids=lambda row: row["constraint"]["kind"])
def test_demonstration_keeps_its_constraint(row: dict) -> None:
    assert row.keys() == {"constraint", "instruction", "answer"}
    assert holds(row["constraint"], row["answer"], row["instruction"])[0]
    assert len(row["answer"].split()) <= 40
    assert not loops(row["answer"])
