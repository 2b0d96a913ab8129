"""Deals rows to workers and forward passes, in micro-batches of similar numbers of tokens.

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
    """Deals the rows of a step."""

    lengths: Sequence[int]
    """Tokens of each row in a forward pass."""
    capacity: int
    """Maximum tokens of a micro-batch of several rows."""
    workers: int
    padded: bool = False
    """Whether all rows of a micro-batch take as many tokens as its longest one."""

    def passes(self, rows: Sequence[int], least: int = 1) -> int:
        """Returns the smallest number of forward passes, from `least` up, with which the rows fit
        into every worker's micro-batches."""

        def fits(passes: int) -> bool:
            micro_batches = self._split(rows, passes * self.workers)
            return max(map(self._tokens, micro_batches)) <= self.capacity

        tokens = sum(self.lengths[row] for row in rows)
        most = math.ceil(len(rows) / self.workers)  # every row is alone
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
            of_pass = micro_batches[number * self.workers : (number + 1) * self.workers]
            # The worker with the most tokens of one pass gets the fewest of the next.
            if number % 2:
                of_pass.reverse()
            for worker, micro_batch in zip(dealt, of_pass, strict=True):
                worker.append(micro_batch)
        return dealt

    def _split(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Returns `count` micro-batches of the rows: slices of the sorted rows if they are padded,
        else of balanced tokens, each row in the one with the fewest tokens so far."""
        longest_first = sorted(rows, key=lambda row: -self.lengths[row])
        if self.padded:
            size, longer = divmod(len(rows), count)
            ends = [at * size + min(at, longer) for at in range(count + 1)]
            return [longest_first[ends[at] : ends[at + 1]] for at in range(count)]
        micro_batches: list[list[int]] = [[] for _ in range(count)]
        fewest = [(0, at) for at in range(count)]
        for row in longest_first:
            tokens, at = fewest[0]
            micro_batches[at].append(row)
            heapreplace(fewest, (tokens + self.lengths[row], at))
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
    """Share in a mean over the step's micro-batches of all workers; 0 without rows."""


def micro_batches(
    order: Sequence[int], global_batch: int, dealer: Dealer, rank: int
) -> list[list[MicroBatch]]:
    """Returns a worker's micro-batches of every step.

    Their number per step is the same in all steps: the smallest with which every step fits.
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
