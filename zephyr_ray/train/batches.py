"""Distributes rows over workers and forward passes, in micro-batches of similar token counts.

All workers make the same number of forward passes per step, because they take part in each other's
collectives. A worker without a row for a pass gets an empty micro-batch.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace


@dataclass(frozen=True)
class Dealer:
    """Distributes the rows of a step over workers and forward passes."""

    lengths: Sequence[int]
    """Tokens of each row in a forward pass."""
    capacity: int
    """Maximum tokens per micro-batch; a single row may exceed it."""
    workers: int
    padded: bool = False
    """Whether all rows of a micro-batch take as many tokens as its longest one."""

    def passes(self, rows: Sequence[int], least: int = 1) -> int:
        """Returns the smallest number of forward passes, at least `least`, for which every
        micro-batch fits into `capacity`."""

        def fits(passes: int) -> bool:
            micro_batches = self._split(rows, passes * self.workers)
            return max(map(self._tokens, micro_batches)) <= self.capacity

        tokens = sum(self.lengths[row] for row in rows)
        most = math.ceil(len(rows) / self.workers)  # one row per micro-batch
        least = max(least, min(most, math.ceil(tokens / self.capacity / self.workers)))
        if least >= most or fits(least):
            return least
        return bisect_left(range(most), True, lo=least + 1, key=fits)

    def deal(self, rows: Sequence[int], passes: int) -> list[list[list[int]]]:
        """Returns the micro-batches of each worker.

        Workers get similar numbers of tokens in every pass, because they wait for each other.
        """
        micro_batches = self._split(rows, passes * self.workers)
        micro_batches.sort(key=self._tokens, reverse=True)
        dealt: list[list[list[int]]] = [[] for _ in range(self.workers)]
        for number in range(passes):
            pass_batches = micro_batches[number * self.workers : (number + 1) * self.workers]
            # The worker with the most tokens in one pass gets the fewest in the next.
            if number % 2:
                pass_batches.reverse()
            for worker, micro_batch in zip(dealt, pass_batches, strict=True):
                worker.append(micro_batch)
        return dealt

    def _split(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Splits the rows into `count` micro-batches. If padded, slices the rows sorted by length;
        otherwise puts each row, longest first, into the micro-batch with the fewest tokens."""
        longest_first = sorted(rows, key=lambda row: -self.lengths[row])
        if self.padded:
            size, longer = divmod(len(rows), count)
            ends = [index * size + min(index, longer) for index in range(count + 1)]
            return [longest_first[ends[index] : ends[index + 1]] for index in range(count)]
        micro_batches: list[list[int]] = [[] for _ in range(count)]
        fewest = [(0, index) for index in range(count)]
        for row in longest_first:
            tokens, index = fewest[0]
            micro_batches[index].append(row)
            heapreplace(fewest, (tokens + self.lengths[row], index))
        return micro_batches

    def _tokens(self, rows: Sequence[int]) -> int:
        lengths = [self.lengths[row] for row in rows]
        return len(lengths) * max(lengths, default=0) if self.padded else sum(lengths)


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass of one worker."""

    rows: Sequence[int]
    """Row numbers; none if the worker only takes part in the others' collectives."""
    weight: float
    """Weight in the mean over the step's micro-batches of all workers; 0 if it has no rows."""


def micro_batches(
    order: Sequence[int], global_batch: int, dealer: Dealer, rank: int
) -> list[list[MicroBatch]]:
    """Returns a worker's micro-batches of every step.

    Every step has the same number of micro-batches per worker: the smallest for which all steps
    fit.
    """
    steps = [order[at : at + global_batch] for at in range(0, len(order), global_batch)]
    passes = 1
    for rows in steps:
        passes = dealer.passes(rows, passes)
    dealt = []
    for rows in steps:
        weight = 1 / min(len(rows), passes * dealer.workers)
        own = dealer.deal(rows, passes)[rank]
        dealt.append([MicroBatch(part, weight if part else 0) for part in own])
    return dealt
