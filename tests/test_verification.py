"""Tests which artifact bytes a plan and a use read, and that a changed byte is found before use."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zephyr_ray import digests
from zephyr_ray.errors import Permanent
from zephyr_ray.models.weights import fingerprint, resolve
from zephyr_ray.store import Store, write_rows

SIZE = 3 << 20
"""Bytes of the weights; above the size from which digests are remembered."""


@pytest.fixture(autouse=True)
def node(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Acts as a node that has read nothing yet; returns a function that switches to another."""

    def new_node() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    new_node()
    return new_node


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Returns a store with one model, `sft-k`."""
    store = Store(tmp_path / "runs")
    store.prepare()
    model = store.folder("sft", "k") / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(os.urandom(SIZE))
    write_rows(model.parent, [{"id": "a"}])
    store.commit("sft", "k")
    return store


def model(store: Store) -> Path:
    return store.folder("sft", "k") / "model"


def megabytes_read(action: Callable[[], object]) -> int:
    """Returns the MiB that this process reads during the action, by the kernel's counter."""

    def total() -> int:
        [line] = [x for x in Path("/proc/self/io").read_text().splitlines() if "rchar" in x]
        return int(line.split()[1])

    before = total()
    action()
    return (total() - before) >> 20


def flip(path: Path, at: int = 0) -> None:
    """Changes one byte, and restores the file's mtime."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_plan_reads_no_bytes_of_an_unchanged_artifact(store: Store, node: Callable) -> None:
    assert megabytes_read(lambda: store.find("sft", "k")) == 0
    node()
    assert megabytes_read(lambda: store.find("sft", "k")) == 0


def test_each_node_reads_weights_once_before_it_uses_them(store: Store, node: Callable) -> None:
    assert megabytes_read(lambda: resolve(str(model(store)))) == 0  # this node wrote them
    node()
    assert megabytes_read(lambda: resolve(str(model(store)))) == 3
    assert megabytes_read(lambda: resolve(str(model(store)))) == 0


def test_a_plan_finds_a_change_that_this_node_can_see(store: Store) -> None:
    flip(model(store) / "model.safetensors", at=SIZE // 2)
    with pytest.raises(Permanent, match="sft-k is corrupted: model/model.safetensors does not"):
        store.find("sft", "k")


def test_a_change_that_keeps_the_mtime_is_found_before_use(
    store: Store, node: Callable, tmp_path: Path
) -> None:
    link = tmp_path / "runs" / "mine" / "models" / "sft"
    link.parent.mkdir(parents=True)
    link.symlink_to(model(store))
    flip(model(store) / "model.safetensors", at=SIZE - 1)
    flip(store.folder("sft", "k") / "rows.jsonl", at=8)
    node()
    artifact = store.find("sft", "k")
    assert artifact
    for path in (model(store), link):
        with pytest.raises(Permanent, match="model.safetensors does not match the hash"):
            resolve(str(path))
    with pytest.raises(Permanent, match="rows.jsonl does not match the hash"):
        artifact.rows()
    with pytest.raises(Permanent, match="does not match the hash"):
        Store(store.storage, read_all=True).find("sft", "k")


def test_a_plan_with_read_all_reads_everything(store: Store) -> None:
    everything = Store(store.storage, read_all=True)
    assert megabytes_read(lambda: everything.find("sft", "k")) == 3


def test_manifests_without_times_cost_one_read(store: Store) -> None:
    path = store.folder("sft", "k") / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"].values():
        del entry["mtime_ns"]
    path.write_text(json.dumps(manifest))
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    assert megabytes_read(lambda: store.find("sft", "k")) == 3
    assert megabytes_read(lambda: store.find("sft", "k")) == 0


def test_a_copied_storage_costs_one_read(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.storage, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = Store(tmp_path / "copy")
    assert megabytes_read(lambda: copy.find("sft", "k")) == 3
    assert megabytes_read(lambda: copy.find("sft", "k")) == 0


def test_a_file_is_not_hashed_until_a_later_change_would_have_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages: list[float] = []

    def digest(path: Path) -> str:
        ages.append(time.time() - path.stat().st_ctime)
        return "0" * 64

    monkeypatch.setattr(digests, "file_digest", digest)
    store = Store(tmp_path)
    store.folder("text", "k").mkdir(parents=True)
    (store.folder("text", "k") / "rows.jsonl").touch()
    store.commit("text", "k")
    assert ages[0] >= digests.TICK_SECONDS


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"model.safetensors": [1]}', '{"model.safetensors": 1}']
)
def test_a_broken_record_costs_one_read(content: str, store: Store) -> None:
    [record] = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json")
    record.write_text(content)
    assert megabytes_read(lambda: resolve(str(model(store)))) == 3
    assert megabytes_read(lambda: resolve(str(model(store)))) == 0


def test_without_a_cache_folder_each_use_reads(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert megabytes_read(lambda: resolve(str(model(store)))) == 3
    assert megabytes_read(lambda: store.find("sft", "k")) == 0


def test_given_weights_are_read_once_for_their_key(store: Store, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(model(store), given)
    keys: list[str] = []
    assert megabytes_read(lambda: keys.append(fingerprint(str(given)))) == 3
    assert megabytes_read(lambda: keys.append(fingerprint(str(given)))) == 0
    flip(given / "model.safetensors")
    keys.append(fingerprint(str(given)))
    assert keys[0] == keys[1] != keys[2]


def test_a_file_that_vanished_is_one_line(store: Store) -> None:
    artifact = store.find("sft", "k")
    assert artifact
    (store.folder("sft", "k") / "rows.jsonl").unlink()
    with pytest.raises(Permanent, match="corrupted: rows.jsonl is missing"):
        artifact.rows()
