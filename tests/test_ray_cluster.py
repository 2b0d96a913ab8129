"""Tests the error lines of a Ray cluster that cannot be joined or started."""

import pytest
import ray

from zephyr_ray.errors import Permanent
from zephyr_ray.ray_cluster import connect


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("auto", "cannot join Ray at auto: no cluster; check RAY_ADDRESS"),
        ("", "cannot start Ray: no cluster; free memory or CPUs"),
    ],
)
def test_joining_and_starting_fail_with_their_own_advice(
    address: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise ConnectionError("no\n cluster")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(Permanent) as caught:
        connect()
    assert str(caught.value) == line
