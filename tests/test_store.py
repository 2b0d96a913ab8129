"""Tests artifacts: keys, manifests that mark them as complete, damage, journals, lock, links."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray import clock as clock_module
from zephyr_ray.clock import Clock
from zephyr_ray.engines.model import RecipeModel
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.manifest import File, Manifest, read_manifest
from zephyr_ray.run_folder import judge_of, link_artifact
from zephyr_ray.stage import Work
from zephyr_ray.store import (
    MAX_PATH_BYTES,
    Journal,
    Store,
    content_key,
    numbered_jsonl,
    read_jsonl,
    write_atomically,
    write_rows,
)
from zephyr_ray.tracking.pipeline_run import Tracking

PARTS = {"kind": "sft", "version": 1, "settings": {"epochs": 1.0, "model": "größe", "lora": None}}


def made(storage: Path) -> Store:
    """Returns a store with one artifact, `text-k`, of two files."""
    store = Store(storage)
    store.prepare()
    folder = store.folder("text", "k")
    (folder / "model").mkdir(parents=True)
    write_rows(folder, [{"id": "a"}, {"id": "b"}])
    (folder / "model" / "weights").write_bytes(b"0123456789")
    (folder / "scratch").mkdir()
    (folder / "scratch" / "journal").write_text("unfinished")
    store.commit("text", "k", counts={"rows": 2})
    return store


def test_a_key_does_not_change_between_versions_or_with_order() -> None:
    # Later versions must compute the same keys, so the expected one comes from sha256sum.
    text = '{"kind":"sft","settings":{"epochs":1.0,"lora":null,"model":"größe"},"version":1}'
    digest = subprocess.run(["sha256sum"], input=text.encode(), capture_output=True).stdout
    assert content_key(PARTS) == digest[:16].decode()
    assert content_key(dict(reversed(PARTS.items()))) == content_key(PARTS)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 2.0, "model": "größe", "lora": None},
        {"epochs": 1.0, "model": "grösse", "lora": None},
        {"epochs": 1.0, "model": "größe"},
        {"epochs": 1.0, "model": "größe", "lora": "None"},
    ],
)
def test_a_key_changes_with_what_it_hashes(settings: dict[str, Any]) -> None:
    assert content_key({**PARTS, "settings": settings}) != content_key(PARTS)


def test_a_folder_without_a_manifest_is_not_an_artifact(tmp_path: Path) -> None:
    store = made(tmp_path)
    (store.folder("text", "k") / "manifest.json").unlink()
    assert store.find("text", "k") is None
    assert store.find("text", "other") is None


def test_an_artifact_is_found_with_its_rows(tmp_path: Path) -> None:
    artifact = made(tmp_path).find("text", "k")
    assert artifact is not None
    assert artifact.rows() == [{"id": "a"}, {"id": "b"}]
    assert artifact.key == "k"
    assert artifact.manifest.counts == {"rows": 2}
    assert set(artifact.manifest.files) == {"rows.jsonl", "model/weights"}
    assert artifact.manifest.files["model/weights"].bytes == 10


def test_a_manifest_holds_texts_of_dropped_rows_that_utf8_cannot_encode(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    work = Work("text", store.folder("text", "k"), 0, {}, {}, {})
    work.folder.mkdir()
    work.drop("long", "r1\ud83d/0")
    work.drop("long", {"id": "r2", "found": ["a \ude00 b", 1, None, ("\U0001f600",)]})
    store.commit("text", "k", counts=work.counts, examples=work.examples)
    artifact = store.find("text", "k")
    assert artifact is not None and artifact.manifest.counts == {"dropped/long": 2}
    assert artifact.manifest.examples["dropped/long"] == [
        "r1?/0",
        {"id": "r2", "found": ["a ? b", 1, None, ["\U0001f600"]]},
    ]


def test_scratch_outlives_a_commit_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.prepare()
    scratch = store.folder("text", "k") / "scratch"
    scratch.mkdir(parents=True)
    (scratch / "journal").write_text("dear")

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zephyr_ray.store.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        store.commit("text", "k")
    assert (scratch / "journal").read_text() == "dear"
    monkeypatch.undo()
    store.commit("text", "k")
    assert not scratch.exists()


def test_without_the_hashes_of_its_files_a_folder_is_not_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.prepare()
    store.folder("text", "k").mkdir()
    write_rows(store.folder("text", "k"), [{"id": "a"}])

    def unreadable(path: Path) -> File:
        raise OSError

    monkeypatch.setattr("zephyr_ray.store.describe", unreadable)
    with pytest.raises(OSError):
        store.commit("text", "k")
    assert store.find("text", "k") is None


def damage_flip(folder: Path) -> None:
    (folder / "model" / "weights").write_bytes(b"0123456780")


def damage_cut(folder: Path) -> None:
    (folder / "model" / "weights").write_bytes(b"012345678")


def damage_lose(folder: Path) -> None:
    (folder / "model" / "weights").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_flip, "model/weights does not match the hash"),
        (damage_cut, "model/weights does not match the hash"),
        (damage_lose, "model/weights is missing"),
    ],
)
def test_damage_is_an_error_and_never_a_rerun(damage: Any, says: str, tmp_path: Path) -> None:
    store = made(tmp_path)
    damage(store.folder("text", "k"))
    with pytest.raises(Permanent, match=f"text-k is corrupted: {says}.*delete"):
        store.find("text", "k")


@pytest.mark.parametrize(
    "manifest",
    ["", '{"key": "k", "fi', "[]", "null", '{"key": "k"}', '{"files": {"a": {}}}', '"a"'],
)
def test_a_broken_manifest_is_damage(manifest: str, tmp_path: Path) -> None:
    store = made(tmp_path)
    (store.folder("text", "k") / "manifest.json").write_text(manifest)
    with pytest.raises(Permanent, match="corrupted: manifest.json is malformed"):
        store.find("text", "k")


def test_a_file_is_written_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "page.html", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_journal_skips_a_half_written_line(tmp_path: Path) -> None:
    Journal(tmp_path, "w").append({"id": 1, "text": "größe"})
    with (tmp_path / "w.jsonl").open("ab") as file:
        file.write(b'{"id": 2, "text": "gr\xc3')  # the kill
    assert [e["id"] for e in Journal(tmp_path).read_new()] == [1]
    Journal(tmp_path, "w").append({"id": 3})
    assert [e["id"] for e in Journal(tmp_path).read_new()] == [1, 3]


def test_journal_returns_what_is_new_since_the_last_call(tmp_path: Path) -> None:
    reader, writer = Journal(tmp_path), Journal(tmp_path, "w")
    assert list(reader.read_new()) == []
    writer.append({"id": 1})
    assert list(reader.read_new()) == [{"id": 1}]
    assert list(reader.read_new()) == []
    with (tmp_path / "w.jsonl").open("ab") as file:
        file.write(b'{"id": 2')
        file.flush()
        assert list(reader.read_new()) == []  # not finished yet
        file.write(b"}\n")
    writer.append({"id": 3})
    assert list(reader.read_new()) == [{"id": 2}, {"id": 3}]


def test_a_writer_reads_the_entries_of_others(tmp_path: Path) -> None:
    own, other = Journal(tmp_path, "own"), Journal(tmp_path, "other")
    own.append({"id": 1})
    other.append({"id": 2})
    assert list(own.read_new(of_others=True)) == [{"id": 2}]
    other.append({"id": 3})
    assert list(own.read_new(of_others=True)) == [{"id": 3}]


def test_a_kill_while_the_clock_is_saved_loses_no_attempt(tmp_path: Path) -> None:
    """Each save is a new file, so that there is always a complete one."""
    path, saves = tmp_path / "clock.json", list[str]()
    for attempt in (1, 2):
        with Clock(path, lambda: saves.append(path.read_text())) as clock:
            first = wait_for_inode(path, 0)
            wait_for_inode(path, first)
        assert clock.attempts == attempt
        assert json.loads(saves[-1])["attempts"] == attempt


def test_the_clock_ticks_on_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(clock_module, "write_atomically", fail)
    ticked = threading.Semaphore(0)
    with Clock(tmp_path / "clock.json", ticked.release):
        assert ticked.acquire(timeout=30) and ticked.acquire(timeout=30)


def wait_for_inode(path: Path, other: int) -> int:
    """Waits until the path is another file; returns its inode number."""
    deadline = time.monotonic() + 30
    while not path.exists() or path.stat().st_ino == other:
        assert time.monotonic() < deadline, "the file was written in place"
        time.sleep(0.02)
    return path.stat().st_ino


def test_journal_has_several_writers(tmp_path: Path) -> None:
    reader = Journal(tmp_path)
    for name in "ba":
        Journal(tmp_path, name).append({"from": name})
    assert sorted(e["from"] for e in reader.read_new()) == ["a", "b"]
    Journal(tmp_path, "b").append({"from": "b again"})
    assert list(reader.read_new()) == [{"from": "b again"}]


HOLD = """
import sys
import threading
import time
from pathlib import Path
from zephyr_ray.store import Store
with Store(Path(sys.argv[1])).exclusive():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(Temporary, match="locked by another run"), store.exclusive():
            pass
    finally:
        holder.kill()  # no chance to clean up
        holder.communicate()
    with store.exclusive():
        pass


def test_a_run_that_fails_leaves_no_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    with pytest.raises(ZeroDivisionError), store.exclusive():
        raise ZeroDivisionError
    with store.exclusive():
        pass


def test_links_survive_a_move_of_the_storage(tmp_path: Path) -> None:
    store = made(tmp_path / "runs")
    view = store.storage / "quickstart" / "data" / "text"
    link = (view.parents[1], "text", ("data/{name}", ""), store.folder("text", "k"))
    link_artifact(*link)
    link_artifact(*link)  # again, over the first
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "quickstart" / "data" / "text"
    assert moved.is_symlink()
    assert list(read_jsonl(moved / "rows.jsonl")) == [{"id": "a"}, {"id": "b"}]


def test_a_folder_in_the_place_of_a_link_is_one_line_and_kept(tmp_path: Path) -> None:
    store = made(tmp_path / "runs")
    view = store.storage / "quickstart" / "data" / "text"
    link = (view.parents[1], "text", ("data/{name}", ""), store.folder("text", "k"))
    view.mkdir(parents=True)
    (view / "notes").write_text("mine")
    with pytest.raises(Permanent, match="data/text to its artifact: a folder is in the way"):
        link_artifact(*link)
    assert [path.name for path in view.parent.iterdir()] == ["text"]
    assert (view / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": "é"}'.encode("latin-1"), "line 1: not UTF-8; convert it to UTF-8"),
        ('{"a": 1}\n{"a": 2}\n'.encode("utf-16"), "line 1: not UTF-8; convert it to UTF-8"),
        (b'[\n{"a": 1}\n]', "line 1: not JSON; write one complete JSON object per line"),
        (b'{\n"a": 1\n}', "line 1: not JSON; write one complete JSON object per line"),
        (b'[{"a": 1}]', "line 1: not a JSON object; write one complete JSON object per line"),
        (b"a,b", "line 1: not JSON; correct the line"),
    ],
)
def test_a_file_that_is_no_jsonl_is_refused_with_its_fix(
    content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(Permanent, match=f"a.jsonl {says}$"):
        list(read_jsonl(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("wait", [-1, float("nan")])
def test_a_wait_that_is_no_time_is_refused(wait: float, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    with pytest.raises(Permanent, match="--wait .*: not a time"), store.exclusive(wait):
        pass


@pytest.mark.parametrize(("third", "says"), [("{", "not JSON"), ("3", "not a JSON object")])
def test_read_jsonl_names_the_line(third: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n\n{third}\n')
    rows = read_jsonl(path)
    assert next(rows) == {"a": 1}
    with pytest.raises(Permanent, match=f"rows.jsonl line 3: {says}"):
        next(rows)


def test_rows_survive_unicode_line_separators(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\nd"}, {"text": "größe"}]
    assert write_rows(tmp_path, rows) == 2
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows
    assert json.loads((tmp_path / "rows.jsonl").read_bytes().split(b"\n")[1]) == rows[1]


def test_a_jsonl_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(Permanent, match=f"cannot read {path}: .*; correct the path"):
            list(numbered_jsonl(path))


def test_a_line_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(Permanent, match="deep.jsonl line 1: not JSON"):
        list(numbered_jsonl(tmp_path / "deep.jsonl"))


def test_a_count_that_is_not_a_number_is_read_back(tmp_path: Path) -> None:
    manifest = Manifest(kind="k", key="1", files={}, counts={"loss": float("nan")})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    assert math.isnan(read_manifest(tmp_path).counts["loss"])


def run_judged_by(folder: Path, judge: dict[str, Any]) -> Path:
    """Returns a run of an earlier version, which stored settings of all engines per model."""
    others = {"weights": "", "base_url": None, "temperature": 0.7, "gpus": 0.0, "relevance": None}
    manifest = {
        **{
            "kind": "pairwise",
            "key": "k",
            "files": {},
            "settings": {"judge": "judge", "control": None},
        },
        "models": {"judge": {**others, **judge}},
    }
    (folder / "data" / "winrate").mkdir(parents=True)
    (folder / "data" / "winrate" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "data" / "winrate" / "result.json").write_text("{}")
    return folder


def test_the_judge_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    rules = judge_of(run_judged_by(tmp_path / "a", {"engine": "rules", "relevance": "minilm"}))
    assert rules and rules.settings == RulesSettings(relevance="minilm")
    vllm = judge_of(run_judged_by(tmp_path / "b", {"engine": "vllm", "weights": "w"}))
    assert vllm and vllm.settings == VllmSettings(weights="w", temperature=0.7)
    assert (
        judge_of(run_judged_by(tmp_path / "c", {"engine": "service", "base_url": "http://x"}))
        is None
    )


def test_the_judge_of_a_run_is_that_of_its_comparison(tmp_path: Path) -> None:
    run = run_judged_by(tmp_path, {"engine": "rules"})
    for name, settings in {"board": {"of": ["winrate"]}, "two_turns": {"judge": "weak"}}.items():
        weak = {"weak": {"engine": "likelihood", "weights": "w"}}
        (run / "data" / name).mkdir()
        manifest = {"kind": name, "key": "k", "files": {}, "settings": settings, "models": weak}
        (run / "data" / name / "manifest.json").write_text(json.dumps(manifest))
        (run / "data" / name / "result.json").write_text("{}")
    judge = judge_of(run)
    assert judge and judge.name == "judge"


def test_the_judge_of_a_run_keeps_its_questions(tmp_path: Path) -> None:
    questions = tmp_path / "mine.yaml"
    questions.write_text("score: $prompt $answer $reply\n")
    settings = VllmSettings(weights="w", questions="mine.yaml")
    judge = RecipeModel("judge", settings, {}, {"questions": questions}).to_model({})
    run = run_judged_by(tmp_path / "a", judge.facts())
    questions.unlink()
    served = judge_of(run)
    assert served and served.wordings == {"score": "$prompt $answer $reply"}


def test_a_judge_with_settings_that_are_no_longer_valid_is_one_line(tmp_path: Path) -> None:
    run = run_judged_by(tmp_path, {"engine": "vllm", "weights": "w", "gpus": 1.5})
    with pytest.raises(Permanent, match="winrate: judge 'judge': setting 'gpus'"):
        judge_of(run)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_storage_without_symbolic_links_is_one_line(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "symlink", fail)
    with pytest.raises(Permanent, match=r"cannot hold symbolic links \(.*--set storage=FOLDER"):
        Store(tmp_path).prepare()


def test_the_longest_path_of_a_storage_holds_a_database(tmp_path: Path) -> None:
    room = MAX_PATH_BYTES - len(os.fsencode(tmp_path)) - 1
    longest = tmp_path / ("a" * (room // 2)) / ("b" * (room - room // 2 - 1))
    Store(longest).prepare()
    Tracking.open(longest, "demo", "key", {})
    with pytest.raises(Permanent, match=r"is not writable \(more than 400 bytes\)"):
        Store(longest / "c").prepare()


@pytest.mark.parametrize("name", ["what?now", "a%20b"])
def test_a_storage_that_a_database_url_cannot_name_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        Permanent, match=r"has a path that MLflow cannot use .*--set storage=FOLDER"
    ):
        Store(tmp_path / name).prepare()
    assert not list(tmp_path.iterdir())
