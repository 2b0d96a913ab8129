"""Tests the grouping of calls: groups, partial results, errors and cancelled items."""

import asyncio
from typing import Any

import pytest

from zephyr_ray.engines.grouping import Grouped


def run(items: list[int], most: int = 10, cancel: set[int] = frozenset()) -> Any:  # type: ignore[assignment]
    """Puts the first item, then the others during its call; returns results, calls and dropped
    results."""
    calls: list[list[int]] = []
    dropped: list[int] = []

    async def double(group: list[int]) -> list[int]:
        calls.append(group)
        await asyncio.sleep(0.01)
        if 13 in group:
            raise ValueError("unlucky")
        return [2 * item for item in group[:most]]

    async def main() -> list[Any]:
        grouped = Grouped[int, int](double, dropped.append)
        futures = [grouped.put(items[0])]
        await asyncio.sleep(0)
        futures += [grouped.put(item) for item in items[1:]]
        for item, future in zip(items, futures, strict=True):
            if item in cancel:
                future.cancel()
        kept = [f for item, f in zip(items, futures, strict=True) if item not in cancel]
        results = await asyncio.gather(*kept, return_exceptions=True)
        await asyncio.sleep(0.05)
        return results

    return asyncio.run(main()), calls, dropped


def test_items_that_arrive_during_a_call_become_the_next_call() -> None:
    assert run([1, 2, 3]) == ([2, 4, 6], [[1], [2, 3]], [])


def test_items_without_a_result_join_the_next_call() -> None:
    results, calls, _ = run([1, 2, 3, 4], most=2)
    assert results == [2, 4, 6, 8] and calls == [[1], [2, 3, 4], [4]]


def test_an_error_of_a_call_reaches_each_of_its_items() -> None:
    results, calls, _ = run([1, 13, 3])
    assert results[0] == 2 and calls == [[1], [13, 3]]
    assert [str(error) for error in results[1:]] == ["unlucky", "unlucky"]


def test_cancelled_items_are_not_part_of_a_later_call() -> None:
    _, calls, dropped = run([1, 2, 3, 4, 5], most=1, cancel={2, 3, 4, 5})
    assert calls == [[1]] and not dropped


@pytest.mark.parametrize("cancelled", [1, 3])
def test_the_result_of_a_cancelled_item_is_dropped(cancelled: int) -> None:
    results, _, dropped = run([1, 2, 3], cancel={cancelled})
    assert results == [2 * n for n in (1, 2, 3) if n != cancelled]
    assert dropped == [2 * cancelled]
