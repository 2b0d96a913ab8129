"""Tests which models answer which prompts, how often, and under which principle."""

from pathlib import Path
from typing import Any

import pytest
from in_process import run, run_here, work_on

from zephyr_ray import model_pool
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.messages import Message, user
from zephyr_ray.models.contract import Reply
from zephyr_ray.principles import VARIANTS
from zephyr_ray.stage import Work
from zephyr_ray.text.completions import Completions

PROMPTS = [
    {
        "id": f"p{n}",
        "instruction": f"Name pet {n}.",
        "prompt": f"Name pet {n}. Be short.",
        "constraint": None,
        "source": "seed",
    }
    for n in range(30)
]


class Pool:
    """Models that answer with their name; `requests` holds the conversations in order."""

    def __init__(self, finish_reason: str = "stop"):
        self._finish_reason = finish_reason
        self.requests: list[tuple[list[Message], int]] = []

    def ask_for(self, model: Model, row: dict[str, Any]) -> Any:
        async def ask(messages: list[Message], *, max_tokens: int) -> Reply:
            self.requests.append((messages, max_tokens))
            return Reply(f"by {model.name}", self._finish_reason, 5, 3)

        return ask


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    engine = Pool()
    run_here(monkeypatch, model_pool, engine)
    return engine


def answered(folder: Path, pool: str, **settings: Any) -> tuple[list[dict[str, Any]], Work]:
    """Returns the rows and the work of a stage with one model per letter of `pool`."""
    folder.mkdir(exist_ok=True)
    work = work_on(folder, prompts=PROMPTS)
    work.models = {name: Model(name, VllmSettings(weights="w")) for name in pool}
    rows = run(Completions(models=list(pool), prompts="prompts", **settings), work)
    return rows, work


def members(rows: list[dict[str, Any]]) -> list[str]:
    return ["".join(c["model"] for c in row["completions"]) for row in rows]


@pytest.mark.usefixtures("pool")
def test_every_member_answers_every_prompt_by_default(tmp_path: Path) -> None:
    rows, work = answered(tmp_path, "abc")
    assert {"".join(sorted(row)) for row in members(rows)} == {"abc"}
    assert all(c["text"] == f"by {c['model']}" for row in rows for c in row["completions"])
    each = {"made/a": 30, "made/b": 30, "made/c": 30}
    assert work.counts == {"rows": 30, "answers": 90} | each


@pytest.mark.usefixtures("pool")
def test_a_larger_pool_is_drawn_from_without_replacement(tmp_path: Path) -> None:
    drawn = members(answered(tmp_path, "abc", per_prompt=2)[0])
    assert set(drawn) == {"ab", "ac", "ba", "bc", "ca", "cb"}


@pytest.mark.usefixtures("pool")
def test_a_smaller_pool_answers_again(tmp_path: Path) -> None:
    rows, work = answered(tmp_path, "ab", per_prompt=5)
    assert set(members(rows)) == {"ababa", "babab"}
    assert work.counts["answers"] == 150


@pytest.mark.usefixtures("pool")
def test_the_seed_draws_members_and_principles(tmp_path: Path) -> None:
    one, same, other = (
        answered(tmp_path / str(n), "abc", per_prompt=2, principles=True, seed=seed)[0]
        for n, seed in enumerate([1, 1, 2])
    )
    assert one == same
    assert members(one) != members(other)
    systems = [[c["system"] for row in rows for c in row["completions"]] for rows in (one, other)]
    assert systems[0] != systems[1]


def test_without_principles_only_the_prompt_is_asked(tmp_path: Path, pool: Pool) -> None:
    rows, _ = answered(tmp_path, "a", max_tokens=7)
    assert pool.requests == [([user(row["prompt"])], 7) for row in PROMPTS]
    answers = [c for row in rows for c in row["completions"]]
    assert {(c["system"], c["principle"]) for c in answers} == {(None, None)}


def test_each_answer_is_drawn_under_a_principle_that_its_row_keeps(
    tmp_path: Path, pool: Pool
) -> None:
    rows, _ = answered(tmp_path, "ab", principles=True)
    answers = [c for row in rows for c in row["completions"]]
    assert all(c["system"] in VARIANTS[c["principle"]] for c in answers)
    assert {c["principle"] for c in answers} >= {"helpfulness", "truthfulness", "honesty"}
    assert [messages[0] for messages, _ in pool.requests] == [
        {"role": "system", "content": c["system"]} for c in answers
    ]


@pytest.mark.usefixtures("pool")
def test_rows_keep_their_columns(tmp_path: Path) -> None:
    rows, _ = answered(tmp_path, "ab")
    assert [{k: v for k, v in row.items() if k != "completions"} for row in rows] == PROMPTS


def test_answers_cut_off_are_counted_as_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, model_pool, Pool("length"))
    rows, work = answered(tmp_path, "ab")
    assert work.counts["truncated"] == 60
    assert {c["finish_reason"] for row in rows for c in row["completions"]} == {"length"}
