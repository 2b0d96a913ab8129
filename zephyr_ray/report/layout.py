"""Lays out a graph in rows, from the top down: boxes, and lines from each box to its readers.

Each box is one row above the first of its readers, or higher if that row is full. Lines cross
the rows in between through lanes, which are narrow places in a row; all lines of a box share its
lanes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 9
"""Passes over the rows to order their items, and again to place them; odd, so that the last one
runs from the top down."""
PULLS = (1, 0.01, 0.1)
"""Weights of a line with 0, 1 and 2 ends that are lanes. Aligned boxes matter more than straight
lanes, and lines bend where a box meets a lane."""


@dataclass(frozen=True)
class Item:
    """A place in a row: a box, or a lane for the lines of a box above."""

    name: str
    row: int
    is_lane: bool = False


Line = tuple[Item, Item]
"""An item and one in the next row."""
Near = dict[Item, list[Item]]
"""Per item, the items in the rows above and below to which lines connect it."""


@dataclass(frozen=True)
class Layout:
    """Places of all items and lines."""

    rows: list[list[Item]]
    lines: list[Line]
    middles: dict[Item, float]
    """Distance of each item's middle from the left edge of the picture."""
    width: float


def lay_out(reads: Mapping[str, Sequence[str]], most: int, box: float, lane: float) -> Layout:
    """Lays out boxes, at most `most` per row. `reads` has, per box, the boxes that it is made from,
    which must come before it; `box` and `lane` are widths, including the space beside them."""
    row_of = _assign_rows(reads, most)
    lines = list(_lines(reads, row_of))
    rows: list[list[Item]] = [[] for _ in range(max(row_of.values(), default=-1) + 1)]
    boxes = [Item(name, row) for name, row in row_of.items()]
    for item in dict.fromkeys([*boxes, *(item for line in lines for item in line)]):
        rows[item.row].append(item)
    near: Near = {item: [] for row in rows for item in row}
    for upper, lower in lines:
        near[upper].append(lower)
        near[lower].append(upper)
    _order(rows, near)

    def half(item: Item) -> float:
        return (lane if item.is_lane else box) / 2

    middles = _place(rows, near, half)
    left = min((middles[item] - half(item) for item in middles), default=0)
    middles = {item: middle - left for item, middle in middles.items()}
    width = max((middle + half(item) for item, middle in middles.items()), default=0)
    return Layout(rows, lines, middles, width)


def _assign_rows(reads: Mapping[str, Sequence[str]], most: int) -> dict[str, int]:
    height: dict[str, int] = {}
    taken: Counter[int] = Counter()
    readers: dict[str, list[str]] = {name: [] for name in reads}
    for name in reversed(list(reads)):
        at = max((height[reader] + 1 for reader in readers[name]), default=0)
        while taken[at] == most:
            at += 1
        height[name] = at
        taken[at] += 1
        for source in reads[name]:
            readers[source].append(name)
    top = max(height.values(), default=0)
    return {name: top - height[name] for name in reads}


def _lines(reads: Mapping[str, Sequence[str]], row_of: dict[str, int]) -> Iterable[Line]:
    for source, start in row_of.items():
        readers = [name for name, sources in reads.items() if source in sources]
        end = max((row_of[reader] for reader in readers), default=start)
        upper = Item(source, start)
        for row in range(start + 1, end + 1):
            for reader in readers:
                if row_of[reader] == row:
                    yield upper, Item(reader, row)
            if row < end:
                lane = Item(source, row, is_lane=True)
                yield upper, lane
                upper = lane


def _order(rows: list[list[Item]], near: Near) -> None:
    """Sorts the items of each row by the mean place of the items they are connected to, so that few
    lines cross. Passes alternate between the row above and the row below."""
    for sweep in range(SWEEPS):
        step = -1 if sweep % 2 else 1
        for row in rows[::step]:
            beside = rows[row[0].row - step] if 0 <= row[0].row - step < len(rows) else []
            share = {item: (n + 0.5) / len(beside) for n, item in enumerate(beside)}
            wanted = {
                item: _mean([share[o] for o in near[item] if o in share], (n + 0.5) / len(row))
                for n, item in enumerate(row)
            }
            row.sort(key=wanted.__getitem__)


def _place(rows: list[list[Item]], near: Near, half: Callable[[Item], float]) -> dict[Item, float]:
    """Places each item under the items it is connected to in the row above, then over those in the
    row below, in alternating passes."""
    middles = {item: 0.0 for row in rows for item in row}
    for sweep in range(SWEEPS):
        step = -1 if sweep % 2 else 1
        for row in rows[::step]:
            offsets = [0.0]
            for before, after in pairwise(row):
                offsets.append(offsets[-1] + half(before) + half(after))
            wanted = []
            for item, offset in zip(row, offsets, strict=True):
                pulls = [
                    (PULLS[item.is_lane + other.is_lane], middles[other])
                    for other in near[item]
                    if other.row == item.row - step
                ] or [(PULLS[1], middles[item])]
                weight = sum(pull for pull, _ in pulls)
                wanted.append((sum(p * at for p, at in pulls) / weight - offset, weight))
            for item, at, offset in zip(row, _rising(wanted), offsets, strict=True):
                middles[item] = at + offset
    return middles


def _rising(values: Sequence[tuple[float, float]]) -> list[float]:
    """Returns the non-decreasing values that are nearest to the given ones, as (value, weight), by
    weighted least squares: each falling run becomes its mean (pool adjacent violators)."""
    runs: list[tuple[float, float, int]] = []
    for value, weight in values:
        run = (value * weight, weight, 1)
        while runs and runs[-1][0] / runs[-1][1] > run[0] / run[1]:
            before = runs.pop()
            run = (before[0] + run[0], before[1] + run[1], before[2] + run[2])
        runs.append(run)
    return [total / weight for total, weight, number in runs for _ in range(number)]


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
