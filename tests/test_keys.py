"""Tests API keys of the service: authentication, rate limits, and serving without keys."""

import contextlib
import time

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.serve.keys import KEYS_VARIABLE, Keys, read_keys, require_keys
from zephyr_ray.serve.request_error import RequestError


def test_a_bucket_of_requests_refills_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keys = Keys(["one-long-key", "two-long-key"], per_minute=3)
    for _ in range(3):
        keys.admit("Bearer one-long-key")
    with pytest.raises(RequestError) as refused:
        keys.admit("Bearer one-long-key")
    assert refused.value.status == 429
    assert refused.value.retry_after == pytest.approx(20)  # a third of a minute
    assert refused.value.headers()["Retry-After"] == "21"
    keys.admit("Bearer two-long-key")  # each key has its own bucket
    now += 20
    keys.admit("Bearer one-long-key")


def test_an_idle_key_saves_up_no_more_than_one_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keys = Keys(["one-long-key"], per_minute=3)
    keys.admit("Bearer one-long-key")
    now += 3600
    for _ in range(3):
        keys.admit("Bearer one-long-key")
    with pytest.raises(RequestError) as refused:
        keys.admit("Bearer one-long-key")
    assert refused.value.status == 429


def test_a_client_that_never_waits_gets_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, admitted = 0.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keys = Keys(["one-long-key"], per_minute=60)
    for number in range(60 + 240):  # a full bucket, then four tries per second for a minute
        now = max(0.0, (number - 60) / 4)
        with contextlib.suppress(RequestError):
            keys.admit("Bearer one-long-key")
            admitted += 1
    assert 118 <= admitted <= 120


@pytest.mark.parametrize("host", ["evil.example:8000", "", None, "[", "127.0.0.1.evil.example"])
def test_without_keys_only_loopback_host_names_are_accepted(host: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        Keys([], per_minute=9).check_host(host)
    assert refused.value.status == 403
    for name in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
        Keys([], per_minute=9).check_host(name)
    Keys(["one-long-key"], per_minute=9).check_host(host)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic one-long-key", "one-long-key", "Bearer \u00e9"]
)
def test_a_header_without_a_valid_key_is_refused(header: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        Keys(["one-long-key"], per_minute=9).admit(header)
    assert refused.value.status == 401


def test_the_log_name_of_a_key_does_not_reveal_it() -> None:
    name = Keys(["one-long-key"], per_minute=9).admit("bearer one-long-key")
    assert name not in "one-long-key" and len(name) == 8


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, " one-long-key,two-long-key ,")
    assert read_keys() == ["one-long-key", "two-long-key"]
    monkeypatch.setenv(KEYS_VARIABLE, "short")
    with pytest.raises(Permanent, match="at least 8"):
        read_keys()


def test_only_loopback_is_served_without_keys() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        require_keys(host, [])
    require_keys("0.0.0.0", ["one-long-key"])
    with pytest.raises(Permanent, match=f"serving on 0.0.0.0 needs keys; set {KEYS_VARIABLE}"):
        require_keys("0.0.0.0", [])
