"""Tests the error lines of a Ray cluster that cannot be joined or started."""

import os
from pathlib import Path

import pytest
import ray

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.pipeline import main
from zephyr_ray.ray_cluster import check_cluster, cluster_address, connect


@pytest.mark.parametrize(
    ("address", "kind", "line"),
    [
        ("auto", Temporary, "cannot join Ray at auto: no cluster; check RAY_ADDRESS"),
        ("", Permanent, "cannot start Ray: no cluster; free memory or CPUs"),
    ],
)
def test_joining_and_starting_fail_with_their_own_advice(
    address: str, kind: type[Exception], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise ConnectionError("no\n cluster")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(kind) as caught:
        connect()
    assert str(caught.value) == line


@pytest.mark.parametrize("address", ["foo", "http://x:80", "ray://here", "1.2.3.4:port", "auto:"])
def test_an_invalid_address_is_one_error_line(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Permanent, match=f"cannot join Ray at {address}: not host:port"):
        check_cluster()


@pytest.mark.parametrize("address", ["", "  ", "local"])
def test_addresses_that_mean_this_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() is None


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_is_checked_before_any_stage(
    variable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a blue thing."}\n')
    (tmp_path / "r.yaml").write_text(
        "models: {m: {engine: openai, model: m, base_url: 'http://127.0.0.1:1'}}\n"
        "stages:\n"
        "  prompts: {kind: prompts, seeds: seeds.jsonl}\n"
        "  dialogues: {kind: self_refine, model: m, prompts: prompts}\n"
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for folder, says in {
        tmp_path / ("x" * 90): "bytes too long for its sockets; set RAY_TMPDIR to a shorter",
        Path("/dev/null"): "Not a directory; set RAY_TMPDIR to a writable folder",
    }.items():
        monkeypatch.setenv(variable, str(folder))
        storage = tmp_path / "runs"
        assert main([str(tmp_path / "r.yaml"), "--set", f"storage={storage}"]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: cannot start Ray in") and says in line
        assert line.count("\n") == 1 and not list(storage.glob("store/prompts-*"))


def test_the_longest_temporary_folder_is_one_that_ray_accepts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """107 bytes for the folder plus /ray/session_2026-01-01_…_<pid>/sockets/plasma_store."""
    room = 107 - len("/ray/session_2026-01-01_00-00-00_000000_/sockets/plasma_store")
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    for length, says in ((room - 5, "No such file"), (room - 4, "1 bytes too long")):
        monkeypatch.setenv("RAY_TMPDIR", "/" + "y" * (length - 1))
        with pytest.raises(Permanent, match=says):
            check_cluster()
