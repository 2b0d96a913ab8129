"""Prepares rows for training: tokenizes them in parallel on Ray Data, block by block.

The driver holds only lengths and counts. A block's content does not depend on how many run at
once, and finished blocks survive a kill, so a restart gives the same result.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from zephyr_ray.blocks import Block, run_blocks, split_into_blocks
from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.messages import with_facts
from zephyr_ray.stage import Progress
from zephyr_ray.store import write_atomically
from zephyr_ray.train.data import ID, Shard, Tokens, write_index
from zephyr_ray.train.model import load_chat

Row = dict[str, Any]
Tokenize = Callable[[ChatFormat, Row, Counter[str]], Tokens]
"""Returns the tokens of a row by column, the same columns for every row, and adds to the counts.
Raises RowError if the row is bad, NothingToTrain if it is sound but has nothing to train on."""


class NothingToTrain(Exception):
    """Raised if a sound row has nothing to train on; the message is the name of the rule."""


@dataclass(frozen=True)
class Preparation:
    """The inputs that all blocks share."""

    path: Path
    """File of the rows."""
    source: str
    """Name of the stage that made the rows."""
    folder: Path
    """Folder of the tokens."""
    weights: str
    """Weights whose chat format writes the rows."""
    columns: tuple[str, ...]
    tokenize: Tokenize
    stops_at_bad_row: bool
    selects: Callable[[Row], bool] | None = None
    """Whether a row is taken; by default all rows are."""


@dataclass
class Summary:
    """Lengths, counts and dropped rows of one block."""

    number: int
    read: int = 0
    lengths: list[list[int]] = field(default_factory=list)
    """Tokens per kept row and column."""
    counts: Counter[str] = field(default_factory=Counter)
    drops: list[tuple[str, str]] = field(default_factory=list)
    """Rule and example of each dropped row."""
    first_bad: str = ""
    """Error line of the first bad row."""
    refusal: str = ""
    """Permanent error that stopped the block, which then has no tokens."""


@dataclass
class Prepared:
    """Counts and examples over all blocks."""

    read: int = 0
    """Rows that were taken, including bad and dropped ones."""
    counts: dict[str, float] = field(default_factory=dict)
    """Counts for the manifest; `dropped/<rule>` of dropped rows."""
    examples: dict[str, list[Any]] = field(default_factory=dict)
    """Up to three examples per count."""
    first_bad: str = ""
    """Error line of the first bad row."""

    def add(self, summary: Summary) -> None:
        self.read += summary.read
        self.first_bad = self.first_bad or summary.first_bad
        for name, count in summary.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for rule, example in summary.drops:
            examples = self.examples.setdefault(f"dropped/{rule}", [])
            self.counts[f"dropped/{rule}"] = self.counts.get(f"dropped/{rule}", 0) + 1
            if len(examples) < 3:
                examples.append(example)


def prepare_rows(preparation: Preparation, progress: Progress) -> Prepared:
    """Writes the tokens of all rows, for `TokenRows`.

    Raises Permanent if a row is bad and `stops_at_bad_row`.
    """
    folder = preparation.folder
    folder.mkdir(parents=True, exist_ok=True)
    blocks = list(split_into_blocks(preparation.path))
    pending = {
        block.number: block for block in blocks if not Shard(folder, block.number).summary.exists()
    }
    progress.restart("rows", sum(block.lines for block in blocks))
    kept = sum(block.lines for block in blocks if block.number not in pending)
    progress.done = progress.resumed = kept
    results, ahead = _run(preparation, list(pending.values())), dict[int, Summary]()
    prepared, rows_per_shard = Prepared(), list[int]()
    lengths = [np.zeros((0, len(preparation.columns) + 1), np.int32)]
    for block in blocks:
        # Blocks finish in any order, but are counted in file order.
        while block.number in pending and block.number not in ahead:
            result = next(results)
            ahead[result.number] = result
            progress.done += pending[result.number].lines
        summary = ahead.pop(block.number, None) or _finished(Shard(folder, block.number))
        if summary.refusal:
            raise Permanent(summary.refusal)
        prepared.add(summary)
        rows_per_shard.append(len(summary.lengths))
        lengths.append(np.array(summary.lengths, np.int32).reshape(-1, lengths[0].shape[1]))
    write_index(folder, [*preparation.columns, ID], np.concatenate(lengths), rows_per_shard)
    progress.restart("rows")
    return prepared


def prepare_block(preparation: Preparation, block: Block) -> Summary:
    """Writes the tokens of a block, and its summary."""
    summary, rows = Summary(block.number), list[Tokens]()
    try:
        for row in _rows(preparation, block):
            tokens = _tokenize(preparation, row, summary)
            if tokens:
                rows.append(tokens)
    except Permanent as error:
        return Summary(block.number, refusal=str(error))
    shard = Shard(preparation.folder, block.number)
    shard.write(rows)
    summary.lengths = [[len(ids) for ids in row.values()] for row in rows]
    summary.counts["rows"] = len(rows)
    write_atomically(shard.summary, json.dumps(vars(summary)))
    return summary


def _rows(preparation: Preparation, block: Block) -> Iterator[Row]:
    rows = map(with_facts, block.rows(preparation.path))
    return filter(preparation.selects, rows) if preparation.selects else rows


def _tokenize(preparation: Preparation, row: Row, summary: Summary) -> Tokens | None:
    """Returns the tokens of a row, or None if it is dropped."""
    summary.read += 1
    try:
        tokens = preparation.tokenize(_chat(preparation.weights), row, summary.counts)
    except RowError as error:
        bad = f"row '{row['id']}' of '{preparation.source}': {error}"
        if preparation.stops_at_bad_row:
            raise Permanent(f"{bad}; correct it, or set bad_rows: drop") from None
        summary.first_bad = summary.first_bad or bad
        summary.drops.append(("bad_rows", f"{row['id']}: {error}"))
        return None
    except NothingToTrain as rule:
        summary.drops.append((str(rule), row["id"]))
        return None
    return {**tokens, ID: list(row["id"].encode(errors="replace"))}


@cache
def _chat(weights: str) -> ChatFormat:
    """Loads the chat format once per process."""
    return load_chat(weights)


def _finished(shard: Shard) -> Summary:
    """Returns the summary of a block that an earlier attempt finished."""
    return Summary(**json.loads(shard.summary.read_text(encoding="utf-8")))


def _run(preparation: Preparation, blocks: list[Block]) -> Iterator[Summary]:
    """Yields the summaries of the blocks in any order."""

    def summarize(block: Block) -> dict[str, Any]:
        return vars(prepare_block(preparation, block))

    failure = (
        f"the rows of '{preparation.source}' could not be tokenized (finished blocks are kept)"
    )
    yield from (Summary(**result) for result in run_blocks(summarize, blocks, failure))
