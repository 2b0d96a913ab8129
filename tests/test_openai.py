"""Tests the `openai` engine as teacher, pool member and judge, against a real vLLM server.

The server runs SmolLM2, so that some of the judge's replies can be parsed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from zephyr_ray import pipeline
from zephyr_ray.engines import endpoint as endpoints

KEY, WRONG, MISSING = "ZEPHYR_TEST_KEY", "ZEPHYR_TEST_WRONG_KEY", "ZEPHYR_TEST_NO_KEY"
SECRET = "sk-test-3f9c1d7e5b"
SERVER_SECONDS = 400
# Set at collection, because the cluster's workers inherit the environment when it starts.
os.environ |= {KEY: SECRET, WRONG: "sk-test-wrong-0000"}
os.environ.pop(MISSING, None)

RECIPE = """
name: remote
models:
  teacher: &remote
    engine: openai
    model: small
    base_url: {url}
    api_key_env: ZEPHYR_TEST_KEY
    concurrency: 4
  cold: {{<<: *remote, temperature: 0}}
  # A model this small may give no readable answer, which would stop the stage.
  judge:
    <<: *remote
    parameters: {{structured_outputs: {{choice: ['{{"score": 3}}', '{{"score": 8}}', "no idea"]}}}}
  ranker:
    <<: *remote
    parameters:
      structured_outputs:
        choice:
          - "[{{'model': 'model_1', 'rank': 1}}, {{'model': 'model_2', 'rank': 2}}]"
          - "[{{'model': 'model_2', 'rank': 1}}, {{'model': 'model_1', 'rank': 2}}]"
stages:
  prompts: {{kind: prompts, seeds: seeds.jsonl, constrained: 0}}
  dialogues: {{kind: self_refine, model: teacher, prompts: prompts, turns: 2, max_tokens: 24}}
  answers: {{kind: completions, models: [teacher, cold], prompts: prompts, max_tokens: 24}}
  feedback: {{kind: feedback, judge: judge, completions: answers, max_failed: 1}}
  warm: {{kind: completions, models: [teacher], prompts: prompts, max_tokens: 24}}
  still: {{kind: completions, models: [cold], prompts: prompts, max_tokens: 24}}
  winrate: {{kind: pairwise, judge: ranker, baseline: still, answers: [warm], max_failed: 1}}
  preference: {{kind: pairwise, judge: cold, form: token, baseline: still, answers: [warm]}}
"""
TASKS = ["Name a blue thing.", "What do cows eat?", "Say good morning.", "Name two cold drinks."]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a vLLM OpenAI server that requires our key, and yields its base URL."""
    from zephyr_ray.models.weights import resolve

    log = tmp_path_factory.mktemp("server") / "log"
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(resolve("smollm2-135m-instruct")), "--served-model-name", "small"),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key", SECRET),
        *("--max-model-len", "1024", "--dtype", "bfloat16", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(1 << 29), "--max-num-seqs", "16"),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def write_recipe(folder: Path, url: str) -> Path:
    (folder / "seeds.jsonl").write_text(
        "".join(json.dumps({"instruction": task}) + "\n" for task in TASKS)
    )
    path = folder / "remote.yaml"
    path.write_text(RECIPE.format(url=url))
    return path


@dataclass
class Run:
    storage: Path
    code: int

    def manifest(self, stage: str) -> dict[str, Any]:
        return next(m for m in self._manifests() if m["name"] == stage)

    def _manifests(self) -> Iterator[dict[str, Any]]:
        for path in self.storage.glob("store/*/manifest.json"):
            yield json.loads(path.read_text())

    def rows(self, stage: str) -> list[dict[str, Any]]:
        text = (self.storage / "remote" / "data" / stage / "rows.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, server: str, ray_cluster: None) -> Run:
    """Runs the complete recipe above in this process."""
    folder = tmp_path_factory.mktemp("remote")
    recipe = write_recipe(folder, server)
    code = pipeline.main([str(recipe), "--set", f"storage={folder / 'runs'}"])
    return Run(folder / "runs", code)


def test_a_remote_teacher_writes_dialogues(run: Run) -> None:
    assert run.code == 0
    rows = run.rows("dialogues")
    assert [row["instruction"] for row in rows] == TASKS
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
        assert all(m["content"].strip() for m in row["messages"])


def test_remote_members_of_a_pool_answer_every_prompt(run: Run) -> None:
    for row in run.rows("answers"):
        assert sorted(c["model"] for c in row["completions"]) == ["cold", "teacher"]
        for completion in row["completions"]:
            assert completion["text"].strip()
            assert completion["finish_reason"] in ("stop", "length")
            assert 0 < completion["tokens"] <= 24


def test_a_remote_judge_scores_from_1_to_10_or_is_counted_unparsable(run: Run) -> None:
    judged = [c for row in run.rows("feedback") for c in row["completions"]]
    assert len(judged) == 2 * len(TASKS)
    unparsable = [c for c in judged if c["score"] is None]
    assert all(1 <= c["score"] <= 10 for c in judged if c["score"] is not None)
    assert all(c["reason"].startswith("unparsable: ") for c in unparsable)
    assert run.manifest("feedback")["counts"]["unparsable"] == len(unparsable)


def test_a_remote_judge_compares_or_is_counted_unparsable(run: Run) -> None:
    result = json.loads((run.storage / "remote/data/winrate/result.json").read_text())
    figures = result["models"]["teacher"]
    decided = figures["wins"] + figures["ties"] + figures["losses"]
    assert decided + figures["parse_failures"] == figures["prompts"] == len(TASKS)
    # The baseline against itself: identical texts are ties without a call.
    assert result["models"]["cold"]["ties"] == len(TASKS)


def test_the_verdict_of_a_remote_judge_comes_from_the_probabilities_of_two_tokens(run: Run) -> None:
    verdicts = [row["verdicts"]["teacher"] for row in run.rows("preference")]
    judged = [verdict for verdict in verdicts if "orders" in verdict]
    assert len(verdicts) == len(TASKS) and judged
    # A sampled answer may equal the baseline's; such answers are a tie without a call.
    assert all(verdict["verdict"] == 0.5 for verdict in verdicts if "orders" not in verdict)
    for verdict in judged:
        assert 0 < verdict["verdict"] < 1
        [a, b, c, d] = map(float, re.findall(r"[AB] ([\d.]+)", verdict["reason"]))
        assert verdict["verdict"] == pytest.approx((a / (a + b) + d / (c + d)) / 2, abs=0.01)


def test_the_key_is_in_no_file_of_the_storage(run: Run) -> None:
    files = [path for path in run.storage.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def run_refused(
    server: str, folder: Path, capsys: pytest.CaptureFixture, *overrides: str
) -> tuple[str, list[dict[str, Any]]]:
    """Returns the error line and the stage's journal of a run that must end with exit code 2."""
    arguments = [str(write_recipe(folder, server)), "--until", "dialogues"]
    for override in (f"storage={folder / 'runs'}", *overrides):
        arguments += ["--set", override]
    assert pipeline.main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    journals = folder.glob("runs/store/self_refine-*/scratch/rows/*.jsonl")
    lines = [line for path in journals for line in path.read_text().splitlines() if line]
    return errors[0], [json.loads(line) for line in lines]


def test_a_wrong_key_is_one_line_before_anything_starts(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A late reply would count as a good one.
    monkeypatch.setattr(endpoints, "PREFLIGHT_SECONDS", 120)
    error, journal = run_refused(server, tmp_path, capsys, f"models.teacher.api_key_env={WRONG}")
    assert "401" in error and f"correct the key in {WRONG}" in error
    assert os.environ[WRONG] not in error
    assert journal == []


@pytest.mark.usefixtures("ray_cluster")
def test_an_unknown_model_stops_the_run_at_once(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    error, journal = run_refused(server, tmp_path, capsys, "models.teacher.model=large")
    assert "model 'large'" in error and "status 404" in error
    assert [entry for entry in journal if "stop" in entry]
    # No row has failed, so a run with the right name asks all of them. A row that waited for its
    # request when the first one failed is left with an environment fault.
    assert not [entry for entry in journal if "row" in entry or "row_fault" in entry]


def test_a_missing_key_is_one_line_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    error, journal = run_refused(
        "http://127.0.0.1:1/v1", tmp_path, capsys, f"models.teacher.api_key_env={MISSING}"
    )
    assert error == f"error: environment variable {MISSING} (api_key_env) is not set; export it"
    assert journal == []
    assert not list(tmp_path.glob("runs/store/*-*"))
