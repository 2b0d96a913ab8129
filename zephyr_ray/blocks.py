"""Runs a function over the blocks of a file of rows: in this process if there are few, otherwise in
parallel on Ray Data."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.ray_cluster import blames_memory, connect
from zephyr_ray.store import numbered_jsonl

log = logging.getLogger("zephyr_ray")

BLOCK_LINES = 1000
"""Lines per block: few enough to fit in the memory of a process and to balance the load."""
FEW_BLOCKS = 8
"""Maximum blocks that run in the driver: another process takes seconds to start."""


@dataclass(frozen=True)
class Block:
    """Consecutive lines of a file of rows."""

    number: int
    start: int
    """Offset in the file, in bytes."""
    first_line: int
    lines: int

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        return (row for _, row in numbered_jsonl(path, self.start, self.first_line, self.lines))


def split_into_blocks(path: Path) -> Iterator[Block]:
    """Yields the blocks of a file."""
    with path.open("rb") as file:
        start = number = 0
        while sizes := [len(line) for line in islice(file, BLOCK_LINES)]:
            yield Block(number, start, number * BLOCK_LINES + 1, len(sizes))
            start, number = start + sum(sizes), number + 1


def run_blocks(
    function: Callable[[Block], dict[str, Any]], blocks: list[Block], failure: str
) -> Iterator[dict[str, Any]]:
    """Yields what the function returns for each block, in any order; it must be JSON. Raises
    Permanent, with a line that begins with `failure`, if Ray runs out of memory."""
    if len(blocks) <= FEW_BLOCKS:
        yield from map(function, blocks)
        return
    import ray

    connect()
    # In the object store, because Ray limits the size of the objects that a function captures.
    stored = ray.put(function)

    def run(item: dict[str, Any]) -> dict[str, Any]:
        block = Block(**json.loads(item["block"]))
        return {"result": json.dumps(ray.get(stored)(block))}

    items = [{"block": json.dumps(asdict(block))} for block in blocks]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(run, num_cpus=1)
    try:
        for batch in dataset.iter_batches(batch_size=None):
            yield from map(json.loads, batch["result"])
    except ray.exceptions.RayError as error:
        log.debug("block pass failed", exc_info=True)
        if blames_memory(error):
            raise Permanent(f"{failure}: out of memory; free memory, or add nodes") from error
        raise
