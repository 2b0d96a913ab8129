"""Tests reference log-probabilities: computed once, resumed pair by pair, shared by dpo stages.

Runs without Ray."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import train_once
from train_processes import train

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.recipe import load
from zephyr_ray.report.chapters import arrange
from zephyr_ray.report.render import render
from zephyr_ray.report.summary import summarize_stages
from zephyr_ray.section import Table
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, Journal, Store, read_jsonl, write_rows
from zephyr_ray.train import reference, reference_stage
from zephyr_ray.train.context import ProcessContext
from zephyr_ray.train.data import TokenRows
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.job import Job, WorkerJob
from zephyr_ray.train.reference import add_reference_log_probs, compute_log_probs
from zephyr_ray.train.reference_stage import Reference

COUNT = 8


def make_stage(kind: Any, **settings: Any) -> Any:
    shared = {"max_length": 128, "precision": "fp32", "zero": 2}
    return kind(model="base", data="data", **shared | settings)


class BlindJournal(Journal):
    def read_new(self, of_others: bool = False) -> Iterator[dict[str, Any]]:
        return iter(())


class LateContext(ProcessContext):
    """A worker that, unless it is the first one, sees no file of another in time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if os.environ["RANK"] != "0":
            reference.Journal = BlindJournal  # type: ignore[misc]


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    """Starts a process group of this process alone."""
    import torch.distributed

    address = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def prepare(tmp_path: Path, tiny_model: Path) -> Callable[..., tuple[Work, Any]]:
    """Returns a function that prepares pairs for a stage and returns its work and data."""

    def run(stage: Any, folder: str, rows: Any = None) -> tuple[Work, Any]:
        rows = rows or train_once.pairs(COUNT)
        work = train_once.work_for(tmp_path / folder, tiny_model, rows)
        return work, stage.prepare(work)

    return run


def job(stage: Dpo, work: Work, tiny_model: Path, file: Path | None = None) -> Job:
    return Job(stage, str(tiny_model), work.folder, list(range(COUNT)), reference=file)


def columns(data: Any) -> list[tuple[float, float]]:
    return [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in data]


def test_the_stage_and_the_pass_before_training_compute_the_same_values(
    prepare: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(work: Work, job: WorkerJob, journal: str, note: Any) -> None:
        data = TokenRows(job.scratch / "data")
        compute_log_probs(job, data, range(len(data)))
        for entry in work.journal(journal).read_new():
            note(entry)

    monkeypatch.setattr(reference_stage, "run_workers", run_here)
    stage = make_stage(Dpo, micro_batch=300, beta=0.5)
    inline, data = prepare(stage, "inline")
    expected = columns(add_reference_log_probs(job(stage, inline, tiny_model), data))
    [(_, *first)] = reference._log_probs(job(stage, inline, tiny_model), data, [[0]])
    assert first == pytest.approx(list(expected[0]), rel=1e-6)

    stage = make_stage(Reference, micro_batch=200)
    work, _ = prepare(stage, "stage")
    stage.run(work)
    rows = list(read_jsonl(work.folder / "rows.jsonl"))
    assert [row["id"] for row in rows] == data.ids()
    computed = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert computed == pytest.approx([value for pair in expected for value in pair], rel=1e-6)
    assert work.progress.done == work.progress.total == work.counts["rows"] == COUNT
    better = [chosen > rejected for chosen, rejected in expected]
    assert 0 < sum(better) < COUNT
    assert work.counts["chosen_more_probable"] == pytest.approx(sum(better) / COUNT)
    margin = sum(chosen - rejected for chosen, rejected in expected) / COUNT
    assert work.counts["margin_mean"] == pytest.approx(margin, abs=1e-4)


def test_a_complete_reference_loads_no_second_model(
    prepare: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a second model")

    monkeypatch.setattr(reference, "load_model", forbidden)
    stage = make_stage(Dpo)
    work, data = prepare(stage, "dpo")
    # The rows are in another order than the data.
    values = {name: (-10.0 - number, -20.0 - number) for number, name in enumerate(data.ids())}
    rows = [{"id": n, "chosen": c, "rejected": r} for n, (c, r) in reversed(values.items())]
    write_rows(tmp_path, rows, "known.jsonl")
    data = add_reference_log_probs(job(stage, work, tiny_model, tmp_path / "known.jsonl"), data)
    assert columns(data) == list(values.values())


def test_pairs_that_a_reference_lacks_are_computed(
    prepare: Any, tiny_model: Path, tmp_path: Path
) -> None:
    stage = make_stage(Dpo)
    work, data = prepare(stage, "all")
    expected = columns(add_reference_log_probs(job(stage, work, tiny_model), data))

    work, data = prepare(stage, "some")
    known = [{"id": name, "chosen": -1.0, "rejected": -2.0} for name in data.ids()[:4]]
    write_rows(tmp_path, known, "known.jsonl")
    partly = add_reference_log_probs(job(stage, work, tiny_model, tmp_path / "known.jsonl"), data)
    assert columns(partly)[:4] == [(-1.0, -2.0)] * 4
    computed = [value for pair in columns(partly)[4:] for value in pair]
    assert computed == pytest.approx([v for pair in expected[4:] for v in pair], rel=1e-6)
    assert {entry["row"] for entry in work.journal("reference").read_new()} == {4, 5, 6, 7}


def test_a_killed_pass_resumes_after_the_last_finished_pair(prepare: Any, tiny_model: Path) -> None:
    class Data:
        """Records the rows that are read; raises KeyboardInterrupt after `most` reads."""

        def __init__(self, data: Any, most: int):
            self.data, self.most, self.read = data, most, list[int]()
            self.lengths = data.lengths

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, row: int) -> Any:
            if row not in self.read and len(self.read) == self.most:
                raise KeyboardInterrupt
            self.read.append(row)
            return self.data[row]

    stage = make_stage(Reference, micro_batch=1)
    work, data = prepare(stage, "killed")
    task = WorkerJob(stage, str(tiny_model), work.folder)
    # Each row is read twice: two batches of one row are completed.
    first, second = Data(data, most=2 * 2), Data(data, most=99)
    with pytest.raises(KeyboardInterrupt):
        compute_log_probs(task, first, range(COUNT))
    finished = {entry["row"]: entry for entry in Journal(work.scratch / "reference").read_new()}
    assert finished.keys() == set(first.read) and len(finished) == 2
    computed = compute_log_probs(task, second, range(COUNT))
    assert set(second.read) == set(range(COUNT)) - finished.keys()
    assert {row: computed[row] for row in finished} == finished and len(computed) == COUNT


def test_workers_need_not_see_each_other_s_files(prepare: Any, tiny_model: Path) -> None:
    """On NFS, new entries reach other machines late."""
    work, data = prepare(make_stage(Dpo), "dpo")
    expected = columns(add_reference_log_probs(job(make_stage(Dpo), work, tiny_model), data))
    work, _ = prepare(stage := make_stage(Reference), "late")
    for row in (0, 5):
        chosen, rejected = expected[row]
        entry = {"row": row, "id": data.ids()[row], "chosen": chosen, "rejected": rejected}
        work.journal("reference", "earlier").append(entry)
    train(WorkerJob(stage, str(tiny_model), work.folder), workers=2, context=LateContext)
    entries = list(Journal(work.scratch / "reference").read_new())
    assert sorted(entry["row"] for entry in entries) == list(range(COUNT))
    for entry in entries:
        computed = entry["chosen"], entry["rejected"]
        assert computed == pytest.approx(expected[entry["row"]], rel=1e-6)


def test_a_reference_without_some_pairs_is_no_artifact(
    prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(work: Work, job: WorkerJob, journal: str, note: Any) -> None:
        note({"row": 1, "id": "1", "chosen": -1.0, "rejected": -2.0})

    monkeypatch.setattr(reference_stage, "run_workers", run_here)
    work, _ = prepare(stage := make_stage(Reference), "short")
    with pytest.raises(Temporary, match=f"{COUNT - 1} pairs have no log-probabilities"):
        stage.run(work)


def test_dpo_and_reference_keep_the_same_rows(prepare: Any) -> None:
    rows = train_once.pairs(COUNT)
    rows[1]["rejected"] = rows[1]["chosen"]
    long = " ".join(train_once.WORDS * 20)
    for side in ("chosen", "rejected"):
        rows[3][side] = [{"role": "user", "content": long}, *rows[3][side][1:]]
    rows[5]["chosen"] = rows[4]["chosen"]  # another prompt
    counts = []
    for kind in (Dpo, Reference):
        work, data = prepare(make_stage(kind, max_failed=0.5), kind.kind, rows)
        assert data.ids() == [rows[number]["id"] for number in (0, 2, 4, 6, 7)]
        counts.append(work.counts)
    assert counts[0] == counts[1]
    dropped = {name: count for name, count in counts[0].items() if name.startswith("dropped/")}
    names = ("same_or_empty_answers", "prompt_fills_max_length", "bad_rows")
    assert dropped == {f"dropped/{name}": 1 for name in names}


QLORA = {"lora": {"quantized": True}, "gpus_per_worker": 1}


@pytest.mark.parametrize(
    ("ours", "theirs", "line"),
    [
        ({"model": "other"}, {}, "reference 'ref' has model base, this stage has other; give both"),
        ({"data": "other"}, {}, "reference 'ref' has data data, this stage has other; give both"),
        ({"max_length": 64}, {}, "reference 'ref' has max_length 128, this stage has 64; give"),
        ({}, {"precision": "bf16"}, "has precision bf16, this stage has fp32; give both the same"),
        (QLORA, {}, "lora.quantized is true, reference 'ref' differs; set ref.quantized: true"),
        ({}, {"quantized": True}, "lora.quantized is false, reference 'ref' differs; set ref.qu"),
    ],
)
def test_a_reference_that_does_not_match_is_refused(
    ours: dict[str, Any], theirs: dict[str, Any], line: str
) -> None:
    shared = {"model": "base", "data": "data", "max_length": 128, "precision": "fp32", "zero": 2}
    ref = Reference(**shared | theirs)
    dpo = Dpo(reference="ref", **shared | ours)
    with pytest.raises(Permanent, match=line):
        dpo.check({}, {"ref": ref})


def test_execution_settings_and_adapters_may_differ() -> None:
    ref = make_stage(Reference, zero=0, workers=4, micro_batch=256)
    make_stage(Dpo, reference="ref", beta=0.5, lora={}).check({}, {"ref": ref})
    ref = make_stage(Reference, quantized=True, gpus_per_worker=1)
    make_stage(Dpo, reference="ref", **QLORA).check({}, {"ref": ref})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"quantized": True}, "^quantized needs a GPU: set gpus_per_worker: 1"),
        ({"quantized": True, "gpus_per_worker": 1, "zero": 3}, "^quantized: ZeRO stage 3 cannot"),
        ({"zero": 0, "offload": "all"}, "offload: all does not work with zero: 0; set zero: 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(Permanent, match=line):
        make_stage(Reference, **settings).check({}, {})


RECIPE = """
name: shared
models:
  base: {weights: WEIGHTS}
stages:
  talks: {kind: published, makes: dialogues, files: talks.jsonl}
  pairs: {kind: published, makes: pairs, files: pairs.jsonl}
  sft: {kind: sft, model: base, data: talks, max_length: 64}
  ref: {kind: reference, model: sft, data: pairs, max_length: 64}
  dpo: {kind: dpo, model: sft, data: pairs, max_length: 64, reference: ref}
  alone: {kind: dpo, model: sft, data: pairs, max_length: 64}
"""


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        (["dpo.beta=0.5", "dpo.learning_rate=1", "dpo.epochs=9", "dpo.loss=ipo"], {"dpo"}),
        (["ref.workers=2", "ref.zero=1", "ref.micro_batch=128"], set()),
        (["ref.max_length=65", "dpo.max_length=65"], {"ref", "dpo"}),
        (["ref.precision=fp32", "dpo.precision=fp32"], {"ref", "dpo"}),
        (["ref.quantized=true"], {"ref", "dpo"}),
        (["sft.epochs=2"], {"sft", "ref", "dpo", "alone"}),
    ],
)
def test_the_key_depends_only_on_weights_pairs_and_tokens(
    changes: list[str], changed: set[str], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "talks.jsonl").write_text(json.dumps(train_once.dialogues(1)[0]) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(train_once.pairs(1)[0]) + "\n")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("WEIGHTS", str(tiny_model)))

    def keys(*changes: str) -> dict[str, str]:
        recipe = load(tmp_path / "r.yaml", KINDS, [f"storage={tmp_path / 'runs'}", *changes])
        return {step.name: step.key for step in make_plan(recipe, Store(recipe.storage))}

    before, after = keys(), keys(*changes)
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_report_shows_how_the_start_model_ranks_the_pairs(tmp_path: Path) -> None:
    counts = {"rows": 500, "margin_mean": -7.25, "chosen_more_probable": 0.44}
    manifest = Manifest(kind="reference", key="k", files={}, name="ref", counts=counts)
    artifact = Artifact(tmp_path, manifest)
    section = make_stage(Reference).section(artifact)
    [table] = section.chapters[0].blocks
    assert isinstance(table, Table) and table.rows == (("ref", 500, -7.25, 0.44),)
    stages, chapters = summarize_stages({"ref": artifact}), arrange({"ref": section}, {})
    page = render("t", findings=[], facts=[], stages=stages, chapters=chapters)
    assert "<h2>Reference</h2>" in page
