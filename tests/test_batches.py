"""Tests how rows are dealt to workers and forward passes. Plain functions."""

import random
from itertools import chain

import pytest

from zephyr_ray.train.batches import Dealer, MicroBatch, micro_batches


def test_the_rows_of_a_step_are_dealt_by_hand() -> None:
    # Longest first, each to the micro-batch with the fewest tokens: 9 | 8 | 7 | 6, then 5 to the 6,
    # 4 to the 7, 3 to the 8, 2 to the 9: all have 11. Of equal ones the first comes first.
    dealer = Dealer(lengths=[2, 3, 4, 5, 6, 7, 8, 9], capacity=11, workers=2)
    rows = list(range(8))
    assert dealer.passes(rows) == 2
    assert dealer.deal(rows, 2) == [[[7, 0], [4, 3]], [[6, 1], [5, 2]]]


def test_a_pass_has_similar_tokens_on_all_workers_and_workers_similar_tokens_in_all() -> None:
    dealer = Dealer(lengths=[8, 7, 6, 5], capacity=8, workers=2)
    assert dealer.deal(range(4), 2) == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_row_is_computed_once_per_step_within_the_capacity(
    workers: int, padded: bool
) -> None:
    pick = random.Random(workers)
    lengths = [pick.randint(1, 60) for _ in range(50)]
    order = [pick.randrange(50) for _ in range(6 * 16)]
    dealer = Dealer(lengths, capacity=100, workers=workers, padded=padded)
    by_worker = [micro_batches(order, 16, dealer, rank) for rank in range(workers)]
    [passes] = {len(step) for steps in by_worker for step in steps}
    for number in range(6):
        parts = [part for steps in by_worker for part in steps[number]]
        dealt = list(chain(*(part.rows for part in parts)))
        assert sorted(dealt) == sorted(order[number * 16 : (number + 1) * 16])
        for part in filter(lambda part: part.rows, parts):
            of_rows = [lengths[row] for row in part.rows]
            assert (max(of_rows) * len(of_rows) if padded else sum(of_rows)) <= 100
        assert sum(part.weight for part in parts) == pytest.approx(1)
    fewer = Dealer(lengths, 100, workers, padded).passes
    assert passes == max(fewer(order[at : at + 16]) for at in range(0, len(order), 16))


def test_all_steps_have_the_fewest_passes_with_which_the_longest_fits() -> None:
    dealer = Dealer(lengths=[1, 1, 1, 1, 5, 5, 5, 5], capacity=10, workers=1)
    short, long = micro_batches(range(8), 4, dealer, rank=0)
    assert [len(part.rows) for part in long] == [2, 2]
    assert [len(part.rows) for part in short] == [2, 2]


def test_a_worker_without_a_row_makes_an_empty_pass() -> None:
    # Three rows that fill a micro-batch each, on two workers.
    dealer = Dealer(lengths=[10, 10, 10], capacity=10, workers=2)
    [first], [second] = (micro_batches([0, 1, 2], 3, dealer, rank) for rank in (0, 1))
    assert first == [MicroBatch([0], 1 / 3), MicroBatch([], 0)]
    assert second == [MicroBatch([1], 1 / 3), MicroBatch([2], 1 / 3)]


@pytest.mark.parametrize(("padded", "passes"), [(False, 1), (True, 2)])
def test_padding_counts(padded: bool, passes: int) -> None:
    dealer = Dealer(lengths=[1, 4, 3, 1], capacity=9, workers=1, padded=padded)
    assert dealer.passes(range(4)) == passes


def test_padded_rows_are_dealt_in_slices_of_the_sorted_rows() -> None:
    dealer = Dealer(lengths=[1, 4, 3, 2, 1], capacity=9, workers=1, padded=True)
    assert dealer.deal(range(5), 2) == [[[1, 2, 3], [0, 4]]]


def test_rows_above_the_capacity_are_alone() -> None:
    dealer = Dealer(lengths=[30, 25, 20], capacity=10, workers=2)
    assert [part.rows for part in micro_batches([0, 1, 2], 3, dealer, 0)[0]] == [[0], []]
    assert [part.rows for part in micro_batches([0, 1, 2], 3, dealer, 1)[0]] == [[1], [2]]
