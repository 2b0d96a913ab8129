"""Tests validation on held-out rows during training: the split, the metrics, and that validation
does not affect training. Training runs in plain processes, without Ray."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import train_once
from train_processes import train, train_until_checkpoint

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.preflight import check_files
from zephyr_ray.recipe import load
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, Journal, write_rows
from zephyr_ray.train import stage as training
from zephyr_ray.train import workers
from zephyr_ray.train.data import TokenRows
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.holdout import is_held_out
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import load_chat, load_model
from zephyr_ray.train.pair_stage import answer
from zephyr_ray.train.sft import Sft

ROOT = Path(__file__).resolve().parents[1]
SFT = train_once.SFT | {
    "zero": 0,
    "micro_batch": 128,
    "epochs": 1,
    "checkpoint_every": 2,
    "validate_every": 5,
    "lora": {"r": 4, "targets": ["q_proj"], "dropout": 0.3},
}
DPO = {
    "workers": 2,
    "micro_batch": 1,
    "zero": 3,
    "global_batch": 4,
    "epochs": 1,
    "beta": 0.3,
    "learning_rate": 1e-3,
    "max_length": 128,
    "precision": "fp32",
    "validate_every": 2,
}


def work_for(folder: Path, model: Path, rows: list[Any], held_out: list[Any]) -> Work:
    work = train_once.work_for(folder, model, rows)
    (folder / "held_out").mkdir()
    write_rows(folder / "held_out", held_out)
    manifest = Manifest(kind="text", key="held_out", files={})
    work.inputs["held_out"] = Artifact(folder / "held_out", manifest)
    return work


def job_of(stage: Sft | Dpo, work: Work) -> Job:
    """Returns the job that the stage would give to Ray Train."""
    jobs: list[Job] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", lambda work, job: jobs.append(job))
        stage.run(work)
    return jobs[0]


def entries(job: Job) -> list[dict[str, Any]]:
    return list(Journal(job.scratch / "steps").read_new())


def validation(entry: dict[str, Any]) -> dict[str, float]:
    return {k.removeprefix("validation/"): v for k, v in entry.items() if "validation/" in k}


def log_probs(model: Any, ids: list[int]) -> Any:
    """Returns log-probabilities over the vocabulary at each position, by plain transformers."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def sft_by_hand(folder: Path, chat: ChatFormat, rows: list[Any]) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    losses, hits = [], []
    for row in rows:
        ids, trained = chat.render(row["messages"])
        predicted = log_probs(model, ids)
        for at in range(1, len(ids)):
            if trained[at]:
                losses.append(-predicted[at - 1, ids[at]].item())
                hits.append(predicted[at - 1].argmax().item() == ids[at])
    return {"loss": sum(losses) / len(losses), "mean_token_accuracy": sum(hits) / len(hits)}


def dpo_by_hand(start: Path, folder: Path, chat: ChatFormat, rows: list[Any]) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    figures: dict[str, list[float]] = {n: [] for n in (*names, "logps/chosen", "logps/rejected")}
    policy, reference = map(AutoModelForCausalLM.from_pretrained, (folder, start))
    for row in rows:
        logps, rewards = [], []
        for side in ("chosen", "rejected"):
            prompt, reply = answer(chat, row[side])
            both = [log_probs(model, prompt + reply) for model in (policy, reference)]
            scores = [
                sum(p[len(prompt) - 1 + n, token].item() for n, token in enumerate(reply))
                for p in both
            ]
            logps.append(scores[0])
            rewards.append(0.3 * (scores[0] - scores[1]))
        margin = rewards[0] - rewards[1]
        values = [math.log(1 + math.exp(-margin)), margin > 0, margin, *rewards, *logps]
        for name, value in zip(figures, values, strict=True):
            figures[name].append(value)
    return {name: sum(values) / len(values) for name, values in figures.items()}


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return load_chat(str(tiny_model))


def asking(question: str, number: int = 0) -> dict[str, Any]:
    ask = {"role": "user", "content": question}
    return {"id": str(number), "messages": [ask, {"role": "assistant", "content": "x"}]}


def test_a_prompt_is_on_one_side_however_it_is_written() -> None:
    sides = set()
    for n in range(50):
        row = asking(f"What is {n} times two?")
        more = {"role": "user", "content": f"And then {n}?"}
        again = [
            asking(f"  what IS {n}\n times two"),
            {"id": "p", "prompt": "other", "chosen": row["messages"], "rejected": []},
            {"id": "s", "messages": [{"role": "system", "content": "Hi"}, *row["messages"], more]},
        ]
        side = is_held_out(row, 0.5)
        assert [is_held_out(same, 0.5) for same in again] == [side] * 3
        sides.add(side)
    assert sides == {True, False}


def test_a_held_out_set_has_about_its_share_and_is_part_of_a_larger_one() -> None:
    rows = [asking(f"Question {n}") for n in range(2000)]
    small, large = ({n for n in range(2000) if is_held_out(rows[n], p)} for p in (0.1, 0.3))
    assert 150 < len(small) < 250 and 520 < len(large) < 680 and small < large


def test_the_side_of_a_prompt_never_changes() -> None:
    """Artifacts of earlier versions held out the same rows."""
    held_out = [n for n in range(20) if is_held_out(asking(f"Question {n}"), 0.3)]
    # The first bytes of sha256("question N") below 0.3 × 256 are 25, 55, 28, 35, 46, 43.
    assert held_out == [1, 8, 11, 13, 18, 19]


def test_held_out_rows_are_not_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    rows = [asking(f"Question {n % 40}?", n) for n in range(80)]
    work = work_for(tmp_path, tiny_model, rows, [])
    stage = Sft(model="base", data="data", validation=0.3, packing=False, max_length=64)
    stage.prepare(work, stage._hold_out(work))
    folders = (work.scratch, work.scratch / "validation" / "scratch")
    trained, held_out = ([int(n) for n in TokenRows(f / "data").ids()] for f in folders)
    assert sorted(trained + held_out) == list(range(80))
    assert {n % 40 for n in trained}.isdisjoint(n % 40 for n in held_out)
    assert (work.counts["rows"], work.counts["validation/rows"]) == (56, 24)
    assert work.counts["validation/trained_tokens"] == 24 * 2  # "x" and its end


def test_reference_log_probs_are_not_used_for_rows_of_another_stage(tmp_path: Path) -> None:
    """Its rows may have the same ids as the rows that the log-probabilities belong to."""

    def reference(validation: Any) -> Path | None:
        stage = Dpo(model="base", data="data", validation=validation)
        job = Job(stage, weights="", folder=tmp_path, order=[], reference=tmp_path / "rows.jsonl")
        return job.validation.reference

    assert reference(0.1) == tmp_path / "rows.jsonl" and reference("held_out") is None


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (0.001, "leaves no row of 'data' to validate on; raise train.validation, or name a stage"),
        (0.999, "leaves no row of 'data' to train on; lower train.validation, or name a stage"),
    ],
)
def test_a_share_that_leaves_one_side_empty_is_an_error(
    share: float, says: str, tiny_model: Path, tmp_path: Path
) -> None:
    work = work_for(tmp_path, tiny_model, [asking("a"), asking("b", 1)], [])
    stage = Sft(model="base", data="data", validation=share)
    with pytest.raises(Permanent, match=f"^stage 'train': validation {share} {says}$"):
        stage._hold_out(work)


@pytest.mark.parametrize(
    ("validation", "trained", "held_out"), [(None, 80, 0), (0.25, 60, 20), ("test", 80, 7)]
)
def test_the_plan_expects_the_rows_of_each_side(
    validation: Any, trained: int, held_out: int
) -> None:
    stage = Sft(model="base", data="data", validation=validation)
    assert stage.split({"data": 80, "test": 7}) == (trained, held_out)
    assert stage.expected({"data": 80, "test": 7}) == trained
    assert stage.expected({}) is None


RECIPE = """\
storage: runs
models: {base: {weights: tiny}}
stages:
  data: {kind: published, makes: dialogues, dataset: some/set}
  same: {kind: published, makes: dialogues, dataset: some/set}
  pairs: {kind: published, makes: pairs, dataset: some/set}
  sft: {kind: sft, model: base, data: data, validation: VALUE}
"""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("data", "validation: 'data' is what the stage trains on; name other data, or write a"),
        ("same", "validation: 'same' is what the stage trains on; name other data, or write a"),
        ("0.0", "validation: 0 is not a share; write a number between 0 and 1, or the name of a"),
        ("1", "validation: 1 is not a share; write a number between 0 and 1, or the name of a"),
        ("pairs", "stage 'sft' reads 'pairs', which makes pairs; name a stage that makes dialogu"),
        ("base", "stage 'sft' reads 'base', which is a model; name a stage that makes dialogues"),
        ("dat", "stage 'sft' reads 'dat', which is neither a stage nor a model of this recipe"),
    ],
)
def test_validation_that_is_not_held_out_data_is_an_error(
    value: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("VALUE", value))
    with pytest.raises(Permanent, match=re.escape(says)):
        check_files(load(path, KINDS))


DIALOGUES = [
    {"input_ids": [5, 6, 7, 8, 9, 2], "labels": [-100, -100, 7, 8, 9, 2]},
    {"input_ids": [5, 9, 2], "labels": [-100, 9, 2]},
    {"input_ids": [5, 9, 4, 2], "labels": [-100, -100, -100, 2]},
]


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("batches", [[[0, 1, 2]], [[2], [0, 1]], [[0], [], [1], [2]]])
def test_measuring_leaves_no_trace_and_does_not_depend_on_the_batches(
    batches: list[list[int]], is_training: bool, tiny_model: Path
) -> None:
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from zephyr_ray.train.validation import Validation

    model, objective = load_model(str(tiny_model)), Sft(model="b", data="d").objective()
    add_fused_lm_head(model, outputs=("log_probs", *objective.fields))
    model.train(is_training)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer: Any = SimpleNamespace(
        model=model,
        model_wrapped=model,
        objective=objective,
        data_collator=objective.collator(0, model),
        accelerator=SimpleNamespace(gather=lambda sums: sums),
        args=SimpleNamespace(device="cpu"),
    )
    state = torch.get_rng_state()
    data: Any = DIALOGUES
    figures = Validation(trainer, data, batches).measure()
    assert model.training == is_training and torch.equal(state, torch.get_rng_state())
    losses = [
        -log_probs(model.eval(), row["input_ids"])[at - 1, row["input_ids"][at]].item()
        for row in DIALOGUES
        for at in range(len(row["labels"]))
        if row["labels"][at] != -100
    ]
    assert figures["validation/loss"] == pytest.approx(sum(losses) / 7, abs=1e-5)


def test_validation_is_in_the_counts_and_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train.torch

    work = train_once.work_for(tmp_path, tmp_path / "model", [])
    work.counts["rows"] = 4
    logged: list[tuple[dict[str, float], int]] = []
    work.log_metrics = lambda metrics, step: logged.append((metrics, step))

    def measured(loss: float, accuracy: float) -> dict[str, float]:
        names = ("loss", "mean_token_accuracy", "rewards/accuracies")
        values = zip(names, (loss, 0.1, accuracy), strict=True)
        return {f"validation/{name}": value for name, value in values}

    def fit() -> None:
        journal = work.journal("steps", "rank0")
        journal.append({"step": 0, "steps": 2, **measured(0.7, 0.5)})
        # Twice, as after a resume.
        for loss in (9.0, 3.0):
            journal.append({"step": 1, "steps": 2, "loss": loss})
            journal.append({"step": 2, "steps": 2, "loss": loss - 1, **measured(loss / 10, 0.75)})

    monkeypatch.setattr(workers, "connect", lambda: None)
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    stage = Dpo(model="base", data="data", global_batch=2, validation="held_out")
    workers.train(work, Job(settings=stage, weights="", folder=work.folder, order=[0] * 4))
    assert (work.counts["steps"], work.counts["train/loss_final"]) == (2, 2.0)
    final = {name: work.counts[name] for name in measured(0, 0)}
    assert final == measured(0.3, 0.75)
    assert work.progress.note == "validation loss 0.300, accuracy 75%"
    assert (measured(0.7, 0.5), 0) in logged and work.progress.resumed == 0
    [curve] = training._curves(Artifact(work.folder, Manifest(kind="dpo", key="k", files={})))
    assert curve.points == ((1, 3.0), (2, 2.0))
    assert curve.validation == ((0, 0.7), (2, 0.3))


@pytest.fixture(scope="module")
def sft_runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Job]:
    """Trains once without validation, and once with it, killed after the first checkpoint and
    resumed."""
    rows = train_once.dialogues(55)
    jobs = []
    for held_out in (None, "held_out"):
        work = work_for(tmp_path_factory.mktemp("sft"), tiny_model, rows[:48], rows[48:])
        stage = Sft(model="base", data="data", validation=held_out, **SFT)
        jobs.append(job_of(stage, work))
    without, with_validation = jobs
    train(without)
    train_until_checkpoint(with_validation)
    train(with_validation)
    return without, with_validation


def test_sft_is_validated_like_plain_transformers(
    sft_runs: tuple[Job, Job], tiny_model: Path, chat: ChatFormat
) -> None:
    _, job = sft_runs
    measured = {entry["step"]: validation(entry) for entry in entries(job)}
    rows = train_once.dialogues(55)[48:]
    for step, folder in ((0, tiny_model), (12, job.folder / "model")):
        expected = sft_by_hand(folder, chat, rows)
        assert {name: measured[step][name] for name in expected} == pytest.approx(
            expected, abs=1e-5
        )


def test_validation_does_not_affect_training(sft_runs: tuple[Job, Job]) -> None:
    """The adapters use dropout, so random numbers drawn by validation would change the losses."""
    without, with_validation = sft_runs
    before, after = ({e["step"]: e["loss"] for e in entries(job) if e["step"]} for job in sft_runs)
    assert len(before) == 12 and after == before
    assert without.settings.validation is None and with_validation.settings.validation


def test_a_resumed_run_has_every_validation_point(sft_runs: tuple[Job, Job]) -> None:
    steps = [entry["step"] for entry in entries(sft_runs[1])]
    assert steps.count(1) == 1, "it started from step 1 again"
    assert {e["step"] for e in entries(sft_runs[1]) if validation(e)} == {0, 5, 10, 12}
    assert steps.count(0) == 1


def test_dpo_is_validated_like_plain_transformers_on_two_workers(
    tiny_model: Path, chat: ChatFormat, tmp_path: Path
) -> None:
    """Uses ZeRO-3 and one pair per forward pass; for the fifth, one worker has an empty batch."""
    pairs = train_once.pairs(17)
    rows, held_out = pairs[:12], pairs[12:]
    work = work_for(tmp_path, tiny_model, rows, held_out)
    job = job_of(Dpo(model="base", data="data", validation="held_out", **DPO), work)
    train(job, workers=2)
    measured = {entry["step"]: validation(entry) for entry in entries(job)}
    assert {step for step, figures in measured.items() if figures} == {0, 2, 3}
    for step, folder in ((0, tiny_model), (3, job.folder / "model")):
        expected = dpo_by_hand(tiny_model, folder, chat, held_out)
        if step == 0:  # margins are 0, so rounding decides their sign
            del expected["rewards/accuracies"]
        got = {name: measured[step][name] for name in expected}
        # Log-probabilities are near -262, where fp32 numbers are 3e-5 apart.
        assert got == pytest.approx(expected, abs=3e-5, rel=1e-6)
    assert abs(measured[3]["rewards/margins"]) > 1e-3
