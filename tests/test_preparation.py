"""Tests that rows prepared block by block are the same for any split, and after a kill."""

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_once

from zephyr_ray.blocks import split_into_blocks
from zephyr_ray.errors import Permanent
from zephyr_ray.messages import with_facts
from zephyr_ray.stage import Work
from zephyr_ray.train import preparation
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.model import load_chat
from zephyr_ray.train.packing import best_fit_decreasing, pack
from zephyr_ray.train.preparation import Preparation
from zephyr_ray.train.sft import Sft
from zephyr_ray.train.stage import WorkerStage

COUNT = 30


def dialogues() -> list[dict[str, Any]]:
    """Returns 30 dialogues; some are bad, some truncated, some truncated to nothing."""
    pick = random.Random(3)
    rows = train_once.dialogues(COUNT)
    for row in rows:
        row["messages"] += pick.choice(rows)["messages"][:2] * pick.randrange(3)
    for number in (4, 11, 18, 25):
        rows[number]["messages"] = rows[number]["messages"][:1]
    for number in (2, 20):
        rows[number]["messages"][0]["content"] = "stone " * 80
    short = [{"role": role, "content": "old"} for role in ("user", "assistant")]
    rows[7] |= {"messages": short, "finish": ["length"]}
    rows[8]["id"] = "Größe 1"
    return rows


def pairs() -> list[dict[str, Any]]:
    rows = train_once.pairs(COUNT)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[9]["rejected"] = rows[10]["rejected"]
    rows[21]["chosen"] = rows[21]["chosen"][:1]
    return rows


STAGES = {
    "sft": (Sft(model="base", data="data", max_length=64, packing=False), dialogues()),
    "packed": (Sft(model="base", data="data", max_length=64, seed=4), dialogues()),
    "dpo": (Dpo(model="base", data="data", max_length=48), pairs()),
}


@pytest.fixture
def work(tmp_path: Path, tiny_model: Path) -> Work:
    work = train_once.work_for(tmp_path, tiny_model, [])
    work.max_failed = 0.5
    return work


def in_blocks(monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    """Runs blocks of this many lines in this process, the last one first."""

    def run(task: Preparation, blocks: list[Any]) -> Any:
        return (preparation.prepare_block(task, block) for block in reversed(blocks))

    monkeypatch.setattr("zephyr_ray.blocks.BLOCK_LINES", lines)
    monkeypatch.setattr(preparation, "_run", run)


def plain_loop(stage: WorkerStage, model: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the tokens of the rows that are kept, one row after another, without a file."""
    chat, made = load_chat(str(model)), []
    for row in map(with_facts, rows):
        try:
            made.append({**stage.tokenize(chat, row, Counter()), "id": row["id"]})
        except Exception:
            continue
    return made


@pytest.mark.parametrize("lines", [1, 7, 1000])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_rows_are_those_of_a_plain_loop_for_any_blocks(
    name: str, lines: int, work: Work, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, rows = STAGES[name]
    in_blocks(monkeypatch, lines)
    data = train_once.prepare(stage, work, rows)
    expected = plain_loop(stage, tiny_model, rows)
    assert len(expected) < COUNT
    assert list(data) == expected and len(data) == len(expected)
    names = [name for name in stage.columns if name != "labels"]
    assert data.lengths.tolist() == [sum(len(row[n]) for n in names) for row in expected]
    assert data.ids() == [row["id"] for row in expected]


@pytest.mark.parametrize("name", STAGES)
def test_counts_and_examples_are_those_of_one_block_for_any_blocks(
    name: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, rows = STAGES[name]
    one_block = list(train_once.prepare(stage, work, rows))
    counts, examples = dict(work.counts), dict(work.examples)
    bad = [example.split(":")[0] for example in examples["dropped/bad_rows"]]
    assert bad == (["9", "21"] if name == "dpo" else ["4", "11", "18"])
    for lines in (2, 13):
        in_blocks(monkeypatch, lines)
        work.counts.clear()
        assert list(train_once.prepare(stage, work, rows)) == one_block
        assert (work.counts, work.examples) == (counts, examples)


def test_the_counts_are_those_of_the_rows(work: Work, tiny_model: Path) -> None:
    stage, rows = STAGES["sft"]
    untruncated = plain_loop(stage.model_copy(update={"max_length": 4096}), tiny_model, rows)
    made = list(train_once.prepare(stage, work, rows))
    trained = sum(label != -100 for row in made for label in row["labels"])
    assert work.counts == {
        "rows": len(made),
        "sequences": len(made),
        "tokens": sum(len(row["input_ids"]) for row in made),
        "trained_tokens": trained,
        "truncated": sum(len(row["input_ids"]) > 64 for row in untruncated),
        "dropped/bad_rows": 4,
        "dropped/truncated_to_nothing": 2,
    }


def test_progress_counts_rows_and_starts_again_for_the_steps(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, rows = STAGES["sft"]
    seen = []
    tokenize = Sft.tokenize

    def watch(self: Sft, *arguments: Any) -> Any:
        seen.append((work.progress.done, work.progress.total, work.progress.unit))
        return tokenize(self, *arguments)

    monkeypatch.setattr(Sft, "tokenize", watch)
    in_blocks(monkeypatch, 12)
    train_once.prepare(stage, work, rows)
    assert list(dict.fromkeys(seen)) == [(0, 30, "rows"), (6, 30, "rows"), (18, 30, "rows")]
    assert (work.progress.done, work.progress.resumed) == (0, 0)


def test_finished_blocks_are_kept_after_a_kill(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, rows = STAGES["packed"]
    in_blocks(monkeypatch, 5)
    expected = list(train_once.prepare(stage, work, rows))
    counts = dict(work.counts)
    folder = work.scratch / "data"
    (folder / "index.npz").unlink()
    for number in (1, 4):
        (folder / f"{number:05}.json").unlink()
    (folder / "00004.npy").write_bytes(b"half")  # the summary is written after the tokens
    read = []
    tokenize = Sft.tokenize

    def watch(self: Sft, chat: Any, row: Any, count: Any) -> Any:
        read.append(row["id"])
        return tokenize(self, chat, row, count)

    monkeypatch.setattr(Sft, "tokenize", watch)
    again = Work(**{**vars(work), "counts": {}, "examples": {}})
    assert list(stage.prepare(again)) == expected
    assert sorted(read) == sorted(row["id"] for row in rows[5:10] + rows[20:25])
    assert again.counts == counts


def test_a_bad_row_of_the_first_block_is_reported_before_later_ones(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, rows = STAGES["sft"]
    in_blocks(monkeypatch, 5)
    stop = stage.model_copy(update={"bad_rows": "stop"})
    says = "^row '4' of 'data': a conversation has no assistant message to train on; correct it"
    with pytest.raises(Permanent, match=says):
        train_once.prepare(stop, work, rows)


def test_the_first_row_is_named_if_all_are_bad(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, rows = STAGES["sft"]
    in_blocks(monkeypatch, 1)
    with pytest.raises(Permanent, match=r"^row '4' of 'data': .*; no row is left to train on$"):
        train_once.prepare(stage, work, [rows[4], rows[11], rows[18]])


def test_a_line_that_is_not_a_row_is_named_by_its_number(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, rows = STAGES["sft"]
    in_blocks(monkeypatch, 4)
    path = work.inputs["data"].folder / "rows.jsonl"
    train_once.prepare(stage, work, rows)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:9], "", "[1]", *lines[11:]]), encoding="utf-8")
    (work.scratch / "data" / "00002.json").unlink()
    with pytest.raises(Permanent, match=r"rows.jsonl line 11: not a JSON object"):
        stage.prepare(work)


def test_rows_may_be_selected(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, rows = STAGES["dpo"]
    in_blocks(monkeypatch, 7)
    everything = list(train_once.prepare(stage, work, rows))
    sides = []
    for rest in (0, 1):
        shutil.rmtree(work.scratch / "data")
        work.counts.clear()
        sides.append(list(stage.prepare(work, lambda row, rest=rest: int(row["id"]) % 2 == rest)))
    assert sides == [[r for r in everything if int(r["id"]) % 2 == rest] for rest in (0, 1)]
    assert work.counts["rows"] == len(sides[1]) > 10


def test_blocks_are_consecutive_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zephyr_ray.blocks.BLOCK_LINES", 2)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"b": "\xc3\xa4"}\n{}\n{"c": 2}')
    blocks = [(b.start, b.first_line, b.lines) for b in split_into_blocks(path)]
    assert blocks == [(0, 1, 2), (10, 3, 2), (25, 5, 1)]


def trl_packing(lengths: list[int], max_length: int, seed: int) -> list[list[int]]:
    """Returns the rows of each sequence as TRL packs them; each row's tokens are its number."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    rows = Dataset.from_dict({"input_ids": [[n] * length for n, length in enumerate(lengths)]})
    packed = pack_dataset(rows.shuffle(seed=seed), max_length, "bfd")
    return [
        [row["input_ids"][at] for at in np.cumsum([0, *row["seq_lengths"][:-1]])] for row in packed
    ]


@pytest.mark.parametrize(("count", "max_length", "seed"), [(1, 9, 0), (300, 20, 1), (2300, 64, 7)])
def test_rows_are_packed_as_trl_packs_them(count: int, max_length: int, seed: int) -> None:
    pick = random.Random(seed)
    lengths = [min(max_length, 1 + int(pick.expovariate(3 / max_length))) for _ in range(count)]
    sequences = pack(np.array(lengths, np.int32), max_length, seed)
    assert sequences == trl_packing(lengths, max_length, seed)
    assert max(sum(lengths[row] for row in rows) for rows in sequences) <= max_length


def test_a_row_goes_into_the_fullest_bin_with_room() -> None:
    assert best_fit_decreasing(np.array([3, 9, 2, 7, 1, 10], np.int32), 10) == [
        [5],
        [1, 4],
        [3, 0],
        [2],
    ]
