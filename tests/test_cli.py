"""Tests the `zephyr` command: chat with a model of a run, and error lines."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import GOOD, Answer, closed_port, endpoint
from serving import free_port

from zephyr_ray import cli
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.run_folder import judge_of, models_of
from zephyr_ray.serve.app import ServeSettings, served_models


def add_model(run: Path, name: str, created: str, model: Path | None = None) -> None:
    """Makes an artifact in the store and a link to its model, as a finished run does."""
    artifact = run.parent / "store" / f"sft-{name}"
    if model:
        shutil.copytree(model, artifact / "model")
    else:
        (artifact / "model").mkdir(parents=True)
    (artifact / "manifest.json").write_text(
        json.dumps({"kind": "sft", "key": name, "files": {}, "created": created})
    )
    (run / "models").mkdir(parents=True, exist_ok=True)
    (run / "models" / name).symlink_to(f"../../store/sft-{name}/model")


def add_judge(run: Path, **settings: Any) -> None:
    """Makes the pairwise artifact of a finished run, with a judge that has these settings."""
    artifact = run.parent / "store" / "pairwise-1"
    artifact.mkdir()
    facts = {"settings": {"judge": "judge", "control": None}, "models": {"judge": settings}}
    (artifact / "manifest.json").write_text(
        json.dumps({"kind": "pairwise", "key": "1", "files": {}, **facts})
    )
    (artifact / "result.json").write_text("{}")
    (run / "data").mkdir()
    (run / "data" / "winrate").symlink_to("../../store/pairwise-1")


def test_the_newest_model_of_a_run_comes_last(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    add_model(run, "sft", "2026-01-01T00:00:00+00:00")
    add_model(run, "dpo", "2026-01-02T00:00:00+00:00")
    assert list(models_of(run).items()) == [
        ("sft", str(tmp_path / "store" / "sft-sft" / "model")),
        ("dpo", str(tmp_path / "store" / "sft-dpo" / "model")),
    ]


def test_the_start_model_of_a_run_can_be_chatted_with(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    add_model(run, "sft", "2026-01-01")
    manifest = tmp_path / "store" / "sft-sft" / "manifest.json"
    models = {"base": {"weights": "small"}, "student": {"weights": str(run / "models" / "sft")}}
    manifest.write_text(json.dumps({"kind": "sft", "key": "k", "files": {}, "models": models}))
    assert list(models_of(run).items())[0] == ("base", "small")


def test_an_unknown_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00")
    assert cli.main(["chat", str(tmp_path / "demo"), "--model", "dpo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"error: {tmp_path / 'demo'} has no model 'dpo'; use one of sft\n"


def test_a_folder_that_is_not_a_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["chat", str(tmp_path / "nothing")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(
        f"error: there is no folder {tmp_path / 'nothing'}; run its recipe"
    )
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--models", "sft,dop"], "has no model 'dop'; use one of sft"),
        (["--adapter", "folder"], "--adapter folder: not an assignment; write NAME=FOLDER"),
        (["--adapter", "mine=/nowhere"], "adapter 'mine': there is no folder /nowhere"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas: 2 is less than replicas, 3"),
        (["--context", "3"], "--context: "),
    ],
)
def test_wrong_serve_options_are_one_line_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], line: str
) -> None:
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00")
    port = str(free_port())
    assert cli.main(["serve", str(tmp_path / "demo"), "--port", port, *options]) == 2
    output = capsys.readouterr()
    assert line in output.err and output.err.count("\n") == 1 and output.out == ""


def test_a_judge_without_its_key_is_one_line_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00")
    add_judge(
        tmp_path / "demo", engine="openai", model="m", base_url="http://x", api_key_env="KEY_9"
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("KEY_9", raising=False)
    assert cli.main(["serve", str(tmp_path / "demo"), "--port", str(free_port())]) == 2
    output = capsys.readouterr()
    line = "error: environment variable KEY_9 (api_key_env) is not set; export it\n"
    assert output.err == line and output.out == ""


@pytest.mark.parametrize("setting", ["weights", "relevance"])
def test_a_judge_without_its_weights_is_one_line_before_ray_starts(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00")
    engine = {"weights": "vllm", "relevance": "rules"}[setting]
    add_judge(tmp_path / "demo", engine=engine, **{setting: "/nowhere"})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["serve", str(tmp_path / "demo"), "--port", str(free_port())]) == 2
    output = capsys.readouterr()
    assert "weights '/nowhere': not a packaged name" in output.err and output.out == ""


def test_a_judge_uses_the_context_of_its_model(tmp_path: Path, tiny_model: Path) -> None:
    """The manifest states the default, 2048 tokens; the model has a context of 512."""
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00")
    add_judge(tmp_path / "demo", **VllmSettings(weights=str(tiny_model)).model_dump())
    judge = judge_of(tmp_path / "demo")
    assert judge is not None
    judge.check()


def test_a_context_above_the_models_is_one_line_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture, tiny_model: Path
) -> None:
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00", tiny_model)
    arguments = ["serve", str(tmp_path / "demo"), "--port", str(free_port())]
    assert cli.main([*arguments, "--context", "513"]) == 2
    output = capsys.readouterr()
    line = "error: context 513 exceeds the 512 tokens of model 'sft'; lower it\n"
    assert output.err == line and output.out == ""
    by_default = served_models(ServeSettings(run=tmp_path / "demo"))
    assert by_default["sft"].context == 512


@pytest.mark.parametrize("config", ["{}", '{"r": "many"}', '{"r": 1000}', "nothing"])
def test_an_adapter_without_a_rank_is_one_line_before_ray_starts(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00")
    (tmp_path / "adapter_config.json").write_text(config)
    arguments = ["serve", str(tmp_path / "demo"), "--port", str(free_port())]
    assert cli.main([*arguments, "--adapter", f"mine={tmp_path}"]) == 2
    output = capsys.readouterr()
    assert "adapter_config.json has no rank (r) of at most 512" in output.err and output.out == ""


def test_an_address_without_a_scheme_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["chat", "127.0.0.1:8000"]) == 2
    assert "begin an address with http:// or https://" in capsys.readouterr().err


def test_a_service_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with closed_port() as port:
        address = f"http://127.0.0.1:{port}"
        assert cli.main(["chat", address]) == 2
    line = f"error: cannot reach {address}; start zephyr serve or correct the address\n"
    assert capsys.readouterr().err == line


def test_a_damaged_manifest_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00")
    (tmp_path / "store" / "sft-sft" / "manifest.json").unlink()
    assert cli.main(["chat", str(tmp_path / "demo")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1


def test_plan_and_run_take_the_pipelines_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a blue thing."}\n')
    recipe = tmp_path / "small.yaml"
    recipe.write_text("stages:\n  prompts: {kind: prompts, seeds: seeds.jsonl, count: 1}\n")
    storage = f"storage={tmp_path / 'runs'}"
    assert cli.main(["plan", str(recipe), "--set", storage]) == 0
    assert "to do" in capsys.readouterr().out
    assert cli.main(["run", str(recipe), "--set", storage, "--until", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/store/prompts-*"))


def test_chat_answers_what_is_piped_in(tmp_path: Path, tiny_model: Path) -> None:
    """Two questions are answered; one too long for the model does not end the conversation."""
    add_model(tmp_path / "demo", "sft", "2026-01-02T00:00:00+00:00", tiny_model)
    questions = ["Hello.", "long " * 400, "", "Still there?"]
    done = subprocess.run(
        [sys.executable, "-m", "zephyr_ray.cli", "chat", str(tmp_path / "demo")],
        input="\n".join(questions) + "\n",
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the conversation continues without this message") == 1
    answers = [text for text in done.stdout.split("\n") if text.strip()]
    assert len(answers) >= 2


@pytest.mark.parametrize(
    ("models", "environment", "says"),
    [
        ("<html>", {}, "is not a chat service; correct the address"),
        ({"object": "list", "data": []}, {}, "has no models; correct the address"),
        ({"object": "list", "data": [{"id": "m"}]}, {}, "has no model 'other'; use one of m"),
        (None, {"ZEPHYR_API_KEY": "sk-ä"}, "ZEPHYR_API_KEY holds a character that no key has"),
        (None, {"ZEPHYR_API_KEY": "sk-1\n2"}, "ZEPHYR_API_KEY holds a character that no key has"),
        (
            None,
            {"HTTP_PROXY": "htp://proxy:1", "NO_PROXY": ""},
            "HTTP_PROXY is not the URL of an http",
        ),
    ],
)
def test_a_service_that_cannot_be_chatted_with_is_one_line(
    models: Any,
    environment: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with endpoint(lambda number, body: GOOD) as server:
        server.models = Answer(200, models)
        assert cli.main(["chat", server.url, "--model", "other"]) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1 and "Traceback" not in line
