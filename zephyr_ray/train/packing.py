"""Packs rows into sequences: decides which rows make a sequence, without moving their tokens."""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from zephyr_ray.train.data import PACKING, Array, Data, TokenRows, save_arrays

BATCH = 1000
"""Rows that are packed at a time, as in TRL's `pack_dataset`."""


def pack(lengths: Array, max_length: int, seed: int) -> list[list[int]]:
    """Returns the rows of each sequence, the same as `Dataset.shuffle(seed)` followed by TRL's
    `pack_dataset` with the strategy "bfd"."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = (order[start : start + BATCH] for start in range(0, len(order), BATCH))
    return [
        batch[bin_].tolist()
        for batch in batches
        for bin_ in best_fit_decreasing(lengths[batch], max_length)
    ]


def best_fit_decreasing(lengths: Array, size: int) -> list[list[int]]:
    """Returns the items of each bin. The longest item comes first, and each goes into the fullest
    bin that has room for it."""
    bins: list[list[int]] = []
    spaces: list[int] = []  # in ascending order
    bins_by_space: dict[int, deque[list[int]]] = defaultdict(deque)
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            bin_ = bins_by_space[space].popleft()
            if not bins_by_space[space]:
                del spaces[at]
        else:
            space, bin_ = size, []
            bins.append(bin_)
        bin_.append(item)
        space -= length
        if space and not bins_by_space[space]:
            insort(spaces, space)
        bins_by_space[space].append(bin_)
    return bins


class PackedRows:
    """Sequences of several rows each: `input_ids`, `labels` and `seq_lengths`."""

    def __init__(self, rows: TokenRows):
        self._rows = rows
        with np.load(rows.folder / PACKING) as packing:
            ends = np.cumsum(packing["rows_per_sequence"])
            self._sequences = np.split(packing["rows"], ends[:-1])
        self.lengths: Array = np.array(
            [rows.lengths[sequence].sum() for sequence in self._sequences], np.int32
        )

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, number: int) -> dict[str, Any]:
        rows = [self._rows[row] for row in self._sequences[number].tolist()]
        joined = {
            name: list(chain.from_iterable(row[name] for row in rows))
            for name in ("input_ids", "labels")
        }
        return {**joined, "seq_lengths": [len(row["input_ids"]) for row in rows]}


def write_packing(folder: Path, sequences: list[list[int]]) -> None:
    """Writes the rows of each sequence, for `open_data`."""
    rows = list(chain.from_iterable(sequences))
    save_arrays(folder / PACKING, rows=rows, rows_per_sequence=list(map(len, sequences)))


def open_data(folder: Path) -> Data:
    """Returns the data set of a folder: its rows, or its sequences if they are packed."""
    rows = TokenRows(folder)
    return PackedRows(rows) if (folder / PACKING).exists() else rows
