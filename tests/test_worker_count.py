"""Tests the setting `workers`: a number or a range, and how plans and checks use it."""

from typing import Any

import pytest
from test_estimate import MISTRAL_7B, shape_of

from zephyr_ray.errors import Permanent
from zephyr_ray.estimate import printing, training
from zephyr_ray.recipe import Hardware
from zephyr_ray.settings import typed
from zephyr_ray.train import memory
from zephyr_ray.train.sft import Sft
from zephyr_ray.train.worker_count import WorkerCount

RANGE = {"least": 2, "most": 8}


def stage(workers: Any, **settings: Any) -> Sft:
    return typed(Sft, {"model": "m", "data": "d", "workers": workers, **settings}, "stage 'sft'")


@pytest.mark.parametrize(
    ("workers", "least", "most", "for_ray"),
    [(1, 1, 1, 1), (4, 4, 4, 4), (RANGE, 2, 8, (2, 8)), ({"least": 3, "most": 3}, 3, 3, 3)],
)
def test_a_number_is_a_range_of_one(workers: Any, least: int, most: int, for_ray: Any) -> None:
    count = stage(workers).workers
    assert (count.least, count.most, count.for_ray()) == (least, most, for_ray)


@pytest.mark.parametrize("workers", [4, RANGE])
def test_manifests_hold_it_as_recipes_write_it(workers: Any) -> None:
    assert stage(workers).model_dump(mode="json")["workers"] == workers


@pytest.mark.parametrize(
    ("workers", "line"),
    [
        (0, "'workers': neither a positive number nor {least: …, most: …} (got 0)"),
        ("two", "'workers': neither a positive number nor {least: …, most: …} (got 'two')"),
        ({"least": 0, "most": 1}, "'workers.least': Input should be greater than or equal to 1"),
        ({"least": 4, "most": 2}, "'workers': least 4 is more than most 2"),
        ({"least": 4}, "'workers.most' is missing"),
        ({"least": 1, "most": 2, "more": 3}, "unknown setting 'workers.more'"),
    ],
)
def test_a_wrong_number_is_one_line(workers: Any, line: str) -> None:
    with pytest.raises(Permanent) as error:
        stage(workers)
    assert line in str(error.value)


def test_a_stage_waits_only_for_the_fewest_workers() -> None:
    needed = stage(RANGE, gpus_per_worker=1, cpus_per_worker=3).processors({})
    assert (needed.cpus, needed.gpus) == (6, 2)


def test_memory_is_that_of_the_fewest_workers() -> None:
    shape = shape_of(MISTRAL_7B)
    few, range_of_them = (memory.worker_memory(stage(count), shape) for count in (2, RANGE))
    assert range_of_them == few
    # One worker gathers nothing, two do: the estimate includes the buffers that two need.
    one, more = (memory.worker_memory(stage(n), shape) for n in (1, {"least": 1, "most": 2}))
    assert (more.weights, more.optimizer) == (one.weights, one.optimizer)
    assert more.buffers == few.buffers > one.buffers


def test_the_plan_states_the_range_and_the_hours_of_both_ends() -> None:
    elastic = stage(RANGE, gpus_per_worker=1)
    shape, hardware = shape_of(MISTRAL_7B), Hardware(gpu_memory_gib=80, tflops=100)
    estimate = training.estimate(elastic, shape, hardware, 100_000, 1000, None)
    fixed = training.estimate(stage(2, gpus_per_worker=1), shape, hardware, 100_000, 1000, None)
    assert estimate.hours == fixed.hours
    text = printing._memory(estimate.memory, elastic)
    assert "per GPU (with the fewest of 2 to 8 GPUs, ZeRO-3): weights" in text
    assert (
        printing._basis(20, elastic.workers, hardware)
        == "at 100 TFLOP/s per GPU with 2; 5.0 h with 8"
    )
    assert printing._basis(20, WorkerCount.fixed(8), hardware) == "at 100 TFLOP/s per GPU"


def test_more_workers_are_advised_as_a_recipe_writes_them() -> None:
    assert training._format({"workers": WorkerCount.fixed(4)}) == "workers: 4"
    counts = training._larger_worker_counts(stage(RANGE))
    assert str(counts[0]) == "{least: 4, most: 8}"
    assert [(count.least, count.most) for count in counts[:3]] == [(4, 8), (8, 8), (16, 16)]
