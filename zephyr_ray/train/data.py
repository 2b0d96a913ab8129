"""Stores tokenized rows on disk, where every worker maps them into memory instead of loading them.

<folder>/00000.npy …     tokens of a block of rows, int32: per row, its columns one after another
<folder>/00000.json …    summary of the block's rows; written after its tokens
<folder>/index.npz       tokens per row and column, rows per block; written last
<folder>/packing.npz     rows per sequence, if rows are packed
"""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = dict[str, list[int]]
"""Token ids of a row, by column."""
Array = NDArray[np.int32]

ID = "id"
"""Column with the row's id: its bytes in UTF-8."""
NOT_READ = ("labels", ID)
"""Columns that do not count as tokens of a forward pass."""
INDEX, PACKING = "index.npz", "packing.npz"


class Data(Protocol):
    """A data set as PyTorch's loader takes it."""

    lengths: Array
    """Tokens of each row in a forward pass."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns the row's columns. Raises IndexError if there is no such row."""


@dataclass(frozen=True)
class Shard:
    """The files of one block of rows."""

    folder: Path
    number: int

    @property
    def tokens(self) -> Path:
        return self.folder / f"{self.number:05}.npy"

    @property
    def summary(self) -> Path:
        return self.folder / f"{self.number:05}.json"

    def write(self, rows: list[Tokens]) -> None:
        """Writes the tokens atomically, and flushes them to disk."""
        values = [np.array(ids, np.int32) for row in rows for ids in row.values()]
        part = self.tokens.with_suffix(f".{os.getpid()}")
        with part.open("wb") as file:
            np.save(file, np.concatenate(values) if values else np.zeros(0, np.int32))
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.tokens)


def write_index(
    folder: Path, columns: list[str], lengths: Array, rows_per_shard: list[int]
) -> None:
    """Writes what `TokenRows` needs besides the shards; `lengths` has shape (rows, columns)."""
    save_arrays(folder / INDEX, columns=columns, lengths=lengths, rows_per_shard=rows_per_shard)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Replaces an .npz file atomically."""
    part = path.with_suffix(f".{os.getpid()}")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


class TokenRows:
    """The rows of a folder, in the order of their file. A row is read on access."""

    def __init__(self, folder: Path):
        self.folder = folder
        with np.load(folder / INDEX) as index:
            columns: list[str] = index["columns"].tolist()
            self._columns = columns
            self._lengths: Array = index["lengths"]
            rows_per_shard = index["rows_per_shard"]
        self._first_rows = np.concatenate([[0], np.cumsum(rows_per_shard)])
        ends = np.cumsum(self._lengths.sum(axis=1, dtype=np.int64))
        self._starts = np.concatenate([[0], ends])
        read = [column not in NOT_READ for column in columns]
        self.lengths: Array = self._lengths[:, read].sum(axis=1, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        start, stop = self._starts[row : row + 2] - self._starts[self._first_rows[number]]
        parts = np.split(self._shard(number)[start:stop], np.cumsum(self._lengths[row])[:-1])
        values = {name: part.tolist() for name, part in zip(self._columns, parts, strict=True)}
        return {**values, ID: bytes(values[ID]).decode()}

    def ids(self) -> list[str]:
        """Returns the ids of all rows."""
        ids = []
        for number, (first, end) in enumerate(pairwise(self._first_rows)):
            shard, start = self._shard(number), self._starts[first]
            for row in range(first, end):
                stop = self._starts[row + 1] - start
                ids.append(bytes(shard[stop - self._lengths[row, -1] : stop].tolist()).decode())
        return ids

    def _shard(self, number: int) -> Array:
        # Mapped anew each time, because a mapping keeps its file descriptor open.
        tokens: Array = np.load(Shard(self.folder, number).tokens, mmap_mode="r")
        return tokens


class WithColumns:
    """A data set with additional columns in memory."""

    def __init__(self, data: Data, columns: dict[str, list[Any]]):
        self._data, self._columns = data, columns
        self.lengths = data.lengths

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._data[row] | {name: values[row] for name, values in self._columns.items()}
