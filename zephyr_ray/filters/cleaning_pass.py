"""Cleans the rows of a file block by block, and removes rows that repeat earlier ones.

Blocks are cleaned in parallel and written to files. The driver holds no rows, only counts, hashes
of texts and, if near duplicates are removed, sketches.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from zephyr_ray import blocks
from zephyr_ray.blocks import Block, run_blocks, split_into_blocks
from zephyr_ray.filters.duplicates import ExactDuplicates, NearDuplicates, sketch
from zephyr_ray.filters.passage import DROPPED, EXAMPLES, Filter, Tally
from zephyr_ray.filters.row_types import Row, RowType, Scores
from zephyr_ray.messages import with_facts
from zephyr_ray.store import read_jsonl, write_rows

NEAR_DUPLICATE = f"{DROPPED}near duplicate"


@dataclass(frozen=True)
class CleaningPass:
    """The settings and inputs that all blocks share."""

    path: Path
    """File of the rows."""
    source: str
    """Name of the stage that made them."""
    folder: Path
    """Folder for the cleaned blocks."""
    rows: RowType
    filters: Sequence[Filter]
    scores: Scores
    similarity: float | None
    """Minimum similarity of near duplicates; None to keep them."""

    def run(self, tally: Tally, finish: Callable[[int], None]) -> Iterator[Row]:
        """Yields the cleaned rows in the order of the file, and fills the tally. Calls `finish`
        with the number of rows of each block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tally.expect(self.filters)
        if self.similarity is not None:
            tally.add(NEAR_DUPLICATE, count=0)
        pending = list(split_into_blocks(self.path))
        failure = f"the rows of '{self.source}' could not be cleaned"
        results = run_blocks(partial(_clean_block, self), pending, failure)
        ahead: dict[int, Tally] = {}
        unique, near = ExactDuplicates(), NearDuplicates(self.similarity or 1)
        repeats: list[tuple[Row, int]] = []
        for block in pending:
            # Blocks finish in any order, but are read in the order of the file.
            while block.number not in ahead:
                result = next(results)
                ahead[result["number"]] = Tally(**result["tally"])
            tally.merge(ahead.pop(block.number))
            finish(block.lines)
            sketches = self._sketches(block.number)
            for number, row in enumerate(read_jsonl(self._file(block.number))):
                if not unique.add(self.rows.identity(row)):
                    tally.add(f"{DROPPED}duplicate", [self.rows.title(row)])
                    continue
                if sketches:
                    key = block.number * blocks.BLOCK_LINES + number
                    earlier = near.add(key, sketches[number], self.rows.group(row))
                    if earlier is not None:
                        tally.add(NEAR_DUPLICATE)
                        tally.fixes[NEAR_DUPLICATE] = "raise near_duplicates"
                        repeats += [(row, earlier)] if len(repeats) < EXAMPLES else []
                        continue
                yield row
        if repeats:
            tally.examples[NEAR_DUPLICATE] = [self._example(row, key) for row, key in repeats]

    def clean(self, block: Block) -> Tally:
        """Writes the cleaned rows of a block, and their sketches."""
        tally = Tally()
        rows = (
            cleaned
            for row in map(with_facts, block.rows(self.path))
            if (cleaned := self.rows.clean(row, self.filters, self.scores, tally))
        )
        write_rows(self.folder, rows, self._file(block.number).name)
        if self.similarity is not None:
            cleaned_rows = read_jsonl(self._file(block.number))
            sketches = [sketch(self.rows.text(row)) for row in cleaned_rows]
            self._file(block.number, ".pickle").write_bytes(pickle.dumps(sketches))
        return tally

    def _file(self, number: int, suffix: str = ".jsonl") -> Path:
        return self.folder / f"{number:06d}{suffix}"

    def _sketches(self, number: int) -> list[Any]:
        if self.similarity is None:
            return []
        sketches: list[Any] = pickle.loads(self._file(number, ".pickle").read_bytes())
        return sketches

    def _example(self, row: Row, key: int) -> dict[str, str]:
        """Returns a near duplicate and the earlier row that it resembles."""
        number, index = divmod(key, blocks.BLOCK_LINES)
        [earlier] = islice(read_jsonl(self._file(number)), index, index + 1)
        return {"prompt": self.rows.text(row), "why": f"resembles: {self.rows.text(earlier)}"}


def _clean_block(task: CleaningPass, block: Block) -> dict[str, Any]:
    return {"number": block.number, "tally": asdict(task.clean(block))}
