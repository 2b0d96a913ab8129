"""Tests the principles of answers: their proportions, their table, and the content key."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray import principles
from zephyr_ray.manifest import Manifest
from zephyr_ray.principles import PROPORTIONS, VARIANTS, draw
from zephyr_ray.section import Table
from zephyr_ray.store import Artifact, content_key, write_rows
from zephyr_ray.text.completions import Completions
from zephyr_ray.text.feedback import Feedback

HELP, TRUTH, HONEST, SURE = VARIANTS
CHAT = {HELP: 60, TRUTH: 20, HONEST: 18, SURE: 2}
PUBLISHED = {
    "evol_instruct": {HELP: 100},
    "false_qa": {TRUTH: 100},
    "flan": {HELP: 60, TRUTH: 20, SURE: 20},
    "flan_v2_cot": {HELP: 60, TRUTH: 20, SURE: 20},
    "sharegpt": CHAT,
    "truthful_qa": {TRUTH: 100},
    "ultrachat": CHAT,
    "generated": CHAT,
}
"""Percent by source, from the README of UltraFeedback; it has no source "generated"."""
DRAWS = 2000


@pytest.mark.parametrize("source", PUBLISHED)
def test_principles_have_the_published_proportions(source: str) -> None:
    rows = [
        {"source": source, "prompt": f"prompt {n}", "member": "m", "sample": 0}
        for n in range(DRAWS)
    ]
    counts = Counter(draw(0, row).name for row in rows)
    assert set(counts) == set(PUBLISHED[source])
    for name, percent in PUBLISHED[source].items():
        p = percent / 100
        assert abs(counts[name] - DRAWS * p) <= 4 * (DRAWS * p * (1 - p)) ** 0.5


def test_every_variant_of_a_principle_is_drawn() -> None:
    assert all(len(set(variants)) >= 5 for variants in VARIANTS.values())
    rows = [
        {"source": "flan", "prompt": f"prompt {n}", "member": member, "sample": sample}
        for n in range(100)
        for member in "ab"
        for sample in range(2)
    ]
    systems = {(p.name, p.system) for p in (draw(0, row) for row in rows)}
    assert systems == {(n, s) for n in (HELP, TRUTH, SURE) for s in VARIANTS[n]}


@pytest.mark.parametrize("change", [{"prompt": "q"}, {"member": "n"}, {"sample": 1}, {"seed": 1}])
def test_the_principle_is_drawn_per_answer(change: dict[str, Any]) -> None:
    def systems(**changed: Any) -> list[str]:
        row = {"seed": 0, "prompt": "p", "member": "m", "sample": 0} | changed
        return [draw(row["seed"], row | {"prompt": f"{row['prompt']}{n}"}).system for n in range(9)]

    assert systems() == systems() != systems(**change)


def test_sentences_and_proportions_are_in_the_key_of_answers_under_principles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = [Completions(models=["m"], prompts="p", principles=value) for value in (False, True)]

    def keys() -> list[str]:
        return [content_key(stage.identity()) for stage in stages]

    before = keys()
    monkeypatch.setitem(VARIANTS, HELP, (*VARIANTS[HELP], "Be kind."))
    variants = keys()
    monkeypatch.setitem(PROPORTIONS, "flan", {HELP: 1.0})
    proportions = keys()
    assert before[0] == variants[0] == proportions[0]
    assert len({before[1], variants[1], proportions[1]}) == 3


def test_the_report_shows_scores_by_principle(tmp_path: Path) -> None:
    answers = [
        {"model": "m", "principle": name, "score": score}
        for name, score in [(TRUTH, 9), (HELP, 4), (HELP, 7), (HELP, None), (None, 1)]
    ]
    rows = [{"id": "p", "completions": answers[:1]}, {"id": "q", "completions": answers[1:]}]
    write_rows(tmp_path, rows)
    artifact = Artifact(tmp_path, Manifest(kind="feedback", key="k", files={}))
    section = Feedback(judge="judge", completions="completions").section(artifact)
    assert section
    [table] = [b for chapter in section.chapters for b in chapter.blocks if isinstance(b, Table)]
    assert table.rows == ((HELP, 3, 0.75, 5.5), (TRUTH, 1, 0.25, 9.0))
    unscored = [{k: v for k, v in a.items() if k != "score"} for a in answers]
    [table] = principles.principle_table(unscored)
    assert isinstance(table, Table) and table.rows == ((HELP, 3, 0.75), (TRUTH, 1, 0.25))
    assert principles.principle_table([{"model": "m"}]) == []
