"""Tests that no secret leaves the program: puts canaries into every channel, runs every command
that can fail cheaply, and searches everything printed and written for canaries."""

import asyncio
import base64
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cluster_lab import JOBS, TEAM, write_profile
from kube_api import TOKEN, Api, Fault

from zephyr_ray import cli, masking
from zephyr_ray.cluster.kube import Kube
from zephyr_ray.cluster.kubeconfig import one_line
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.formatting import shorten
from zephyr_ray.manifest import Manifest
from zephyr_ray.masking import has_credentials, masked
from zephyr_ray.messages import user
from zephyr_ray.recipe_file import refuse_secrets
from zephyr_ray.row_actor import RowActor
from zephyr_ray.store import Artifact
from zephyr_ray.tracking.pipeline_run import Tracking

CANARIES = {
    "MY_JUDGE": "canary-in-api-key-env",  # named by the recipe only
    "HF_TOKEN": "hf_canaryInHfToken",
    "OPENAI_API_KEY": "canary-in-unused-key",
    "MLFLOW_TRACKING_PASSWORD": "canary-in-password",
    "ZEPHYR_API_KEY": "canary-in-chat-key",
    "ZEPHYR_API_KEYS": "canary-in-first-key,canary-in-second-key",
    "MLFLOW_TRACKING_URI": "http://zed:canary-in-tracking@127.0.0.1:9",
    "HTTPS_PROXY": "http://zed:canary-in-proxy@127.0.0.1:9",
    "HF_ENDPOINT": "http://zed:canary-in-endpoint@127.0.0.1:9",
    "RAY_ADDRESS": "ray://zed:canary-in-ray@127.0.0.1:9",
}
RECIPE = """
name: small
storage: runs
models:
  judge: {{engine: openai, model: gpt, base_url: "{url}", api_key_env: MY_JUDGE}}
  base: {{weights: owner/tiny}}
stages:
  prompts: {{kind: prompts, seeds: seeds.jsonl, constrained: 0}}
"""
ANSWERS = "  answers: {kind: completions, models: [base], prompts: prompts, max_tokens: 8}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with a recipe; every channel of the environment holds a canary."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(masking, "_remembered", set())  # without the secrets of other tests
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a blue thing."}\n')
    (tmp_path / "small.yaml").write_text(RECIPE.format(url="http://127.0.0.1:9/v1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def search(folder: Path, *texts: str) -> None:
    """Fails if a canary is in a text or in a file below the folder."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "kubeconfig":
            texts = (*texts, path.read_bytes().decode(errors="replace"))
    for text in texts:
        assert "canary" not in text.lower() and TOKEN not in text, text


LINES = {
    "recipe: password": (
        ["models.judge.base_url=http://zed:canary-1@h/v1"],
        "without user or pass",
    ),
    "recipe: token as user": (["models.judge.base_url=https://canary-1@h"], "api_key_env"),
    "recipe: password with a slash": (["models.judge.base_url=http://z:canary/1@h"], "api_key_env"),
    "recipe: parameter": (["models.judge.base_url=http://h/v1?api_key=canary-1"], "api_key_env"),
    "recipe: signature": (["models.base.weights=https://h/m?x=1&sig=canary-1"], "'models.base.wei"),
    "recipe: key as a setting": (
        ["models.judge.api_key=canary-1"],
        "'models.judge.api_key' is a s",
    ),
    "recipe: code": (["models.judge.base_url=https://h/v1?code=canary-1"], "contains a query"),
    "recipe: port as password": (["models.judge.base_url=http://u:12/canary-1@h/v1"], "api_key_en"),
    "recipe: whitespace": (["models.judge.base_url=http://u:pa canary-1@h/v1"], "api_key_env"),
    "recipe: token": (["models.judge.parameters={token: canary-1}"], "parameters.token' is a s"),
    "recipe: tokens": (["models.judge.parameters={auth-keys: [canary-1]}"], "auth-keys.0' is a s"),
    "recipe: header": (
        ["models.judge.parameters={extra_headers: {x-api-key: canary-1}}"],
        "parameters.extra_headers.x-api-key' is a secret",
    ),
    "recipe: list of headers": (
        ["models.judge.parameters={headers: ['Authorization: Bearer canary-1']}"],
        "parameters.headers.0' is a secret",
    ),
    "recipe: no scheme": (["models.judge.base_url=zed:canary-1@h"], "must start with http"),
    "recipe: no scheme, slash": (["models.judge.base_url=me:12/canary@h"], "must start with http"),
    "recipe: only slashes": (["models.judge.base_url=//me:canary-1@h"], "must start with http"),
    "recipe: key in the wrong place": (["models.judge.concurrency=canary-in-chat-key"], "integer"),
    "recipe: key that is a list": (["models.judge.api_key_env=[canary-1]"], "not the name"),
    "set: wrong stage": (["nostage.base_url=http://zed:canary-1@h"], "has no 'nostage'"),
    "set: wrong model": (["models.no.api_key=canary-1"], "has no 'no'"),
    "set: no assignment": (["http://zed:canary-1@h"], "not an assignment"),
    "set: key": (["canary-1"], "--set: not an assignment"),
    "set: no setting": ([".a=canary-1"], "--set .a=…: not an assignment"),
    "set: no models": (["judge.api_key_env=canary-1"], "write models.judge.api_key_env=…"),
    "set: no mapping": (["models.judge.model.a=canary-1"], "'model' is not a mapping"),
    "set: no parent": (["prompts.x.api_key=canary-1"], "write --set 'prompts.x={api_key: …}'"),
    "set: bad value": (["models.judge.model=[canary-1"], "model=…: the value is not valid YAML"),
    "storage": (["storage=http://zed:canary-1@bucket"], "setting 'storage'"),
    "storage of a cloud": (["storage=s3://canary-1@bucket"], "setting 'storage'"),
}


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("command", ["plan", "submit"])
def test_a_refused_recipe_prints_no_secret(
    folder: Path, capfd: pytest.CaptureFixture, command: str, case: str
) -> None:
    sets, expected = LINES[case]
    assert cli.main([command, "small.yaml", *(p for line in sets for p in ("--set", line))]) == 2
    output = capfd.readouterr()
    assert expected in output.err and output.err.count("\n") == 1
    search(folder, output.out, output.err)


PROFILES: dict[str, tuple[dict[str, Any], str]] = {
    "password": ({"mlflow": "http://me:canary-1@mlflow"}, "without user or password"),
    "parameter": ({"mlflow": "http://mlflow?token=canary-1"}, "without user or password"),
    "image": ({"image": "https://me:canary-1@registry/x"}, "without user or password"),
    "key for its Secret": ({"secrets": {"JUDGE_KEY": "canary-1"}}, "setting 'secrets.JUDGE_KEY'"),
    "key as a name": ({"secrets": {"K": {"name": "canary_1", "key": "k"}}}, "secrets.K.name"),
    "password as a setting": ({"password": "canary-1"}, "setting 'password' is a secret"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_refused_profile_prints_no_secret(
    folder: Path, capfd: pytest.CaptureFixture, case: str
) -> None:
    change, expected = PROFILES[case]
    write_profile(folder, **change)
    assert cli.main(["status"]) == 2
    output = capfd.readouterr()
    assert expected in output.err and output.err.count("\n") == 1
    (folder / "zephyr-cluster.yaml").unlink()
    search(folder, output.out, output.err)


COMMANDS = {
    "plan": ["plan", "small.yaml"],
    "tracking": ["run", "small.yaml", "--set", "prompts.seeds=seeds.jsonl"],
    "arguments": ["plan", "small.yaml", "--sett", "http://zed:canary-1@h"],
    "more arguments": ["status", "--token=canary-1"],
    "an address": ["chat", "http://zed:canary-1@127.0.0.1:9"],
    "an address without a scheme": ["chat", "zed:canary-1@127.0.0.1:9"],
    "serve": ["serve", "http://zed:canary-1@h"],
    "serve an adapter": ["serve", "runs", "--adapter", "http://zed:canary-1@h"],
    "status": ["status"],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_that_fail(
    folder: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if case == "tracking":
        monkeypatch.delenv("RAY_ADDRESS")
    config = Api.kubeconfig(type("", (), {"address": "http://127.0.0.1:9"}), {"token": TOKEN})  # type: ignore[arg-type]
    (folder / "kubeconfig").write_text(config)
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    try:
        code: Any = cli.main(COMMANDS[case])
    except SystemExit as exit:
        code = exit.code
    output = capfd.readouterr()
    assert code == (0 if case == "plan" else 1 if case in ("status", "tracking") else 2)
    search(folder, output.out, output.err)


def test_ray_at_an_address_with_a_password(folder: Path, capfd: pytest.CaptureFixture) -> None:
    (folder / "small.yaml").write_text((folder / "small.yaml").read_text() + ANSWERS)
    assert cli.main(["run", "small.yaml"]) == 1
    output = capfd.readouterr()
    assert "RAY_ADDRESS" in output.err
    search(folder, output.out, output.err)


def test_the_last_lines_name_the_server_without_its_password(
    folder: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert cli.main(["run", "small.yaml"]) == 0
    runs = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning\n"
    assert runs in capfd.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", CANARIES["MLFLOW_TRACKING_URI"])
    assert cli.main(["run", "small.yaml"]) == 0
    output = capfd.readouterr()
    assert "MLflow  http://127.0.0.1:9\n" in output.out
    search(folder, output.out, output.err)


@pytest.mark.parametrize("command", ["submit small.yaml", "status", "status j", "logs j", "doctor"])
@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_cluster_that_quotes_the_token(
    api: Api, here: Path, capfd: pytest.CaptureFixture, command: str, status: int
) -> None:
    api.objects[f"{JOBS}/j"] = {"metadata": {"name": "j"}}
    api.objects[f"{TEAM}/secrets/keys"] = {"data": {"judge": base64.b64encode(b"canary").decode()}}
    message = f"invalid header Authorization: Bearer {TOKEN} at http://zed:canary-1@proxy"
    api.faults = [Fault(m, "", status, 99, message) for m in ("GET", "POST", "PATCH", "DELETE")]
    assert cli.main(command.split()) in ((0, 1) if command == "doctor" else (1, 2))
    output = capfd.readouterr()
    search(here, output.out, output.err)


def test_a_job_that_prints_a_url_with_a_password(
    api: Api, here: Path, capfd: pytest.CaptureFixture
) -> None:
    api.objects[f"{JOBS}/j"] = {"metadata": {"name": "j"}}
    api.pod("j-1", "j", "Succeeded")
    api.log("j-1", "joins http://zed:canary-1@host:1/x", "2026-01-01T00:00:00Z")
    assert cli.main(["logs", "j"]) == 0
    output = capfd.readouterr()
    assert output.out == "joins http://host:1/x\n"


@contextmanager
def echo(status: int) -> Iterator[str]:
    """Serves errors that quote the request's key, and yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            text = f"wrong key {self.headers['Authorization']}"
            content = json.dumps({"error": {"message": text}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.headers["Content-Length"] = "0"
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_an_endpoint_that_quotes_the_key(
    folder: Path, capfd: pytest.CaptureFixture, status: int
) -> None:
    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        return {"answer": (await ask([user(row["prompt"])], max_tokens=4)).text}

    with echo(status) as address:
        settings = OpenAISettings(
            engine="openai", model="m", base_url=f"{address}/v1", api_key_env="MY_JUDGE"
        )
        actor = RowActor(program, {"m": Model("m", settings)}, 0, str(folder / "journal"), 1)
        rows = [json.dumps({"id": "1", "prompt": "a"})]
        asyncio.run(actor({"row": rows}))
    [journal] = (folder / "journal").glob("*.jsonl")
    assert "wrong key" in journal.read_text()
    output = capfd.readouterr()
    search(folder, output.out, output.err)


def test_an_unexpected_exception_is_masked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def program(row: dict[str, Any], ask: Any) -> dict[str, Any]:
        raise ValueError(f"Invalid header value b'Bearer {CANARIES['HF_TOKEN']}\\n'")

    settings = OpenAISettings(engine="openai", model="m", base_url="http://127.0.0.1:9/v1")
    actor = RowActor(program, {"m": Model("m", settings)}, 0, str(folder / "journal"), 1)
    asyncio.run(actor({"row": [json.dumps({"id": "1", "prompt": "a"})]}))
    assert "Invalid header value" in caplog.text
    search(folder, caplog.text)


@pytest.mark.parametrize("status", [400, 401])
def test_a_chat_service_that_quotes_the_key(
    folder: Path, capfd: pytest.CaptureFixture, status: int
) -> None:
    with echo(status) as address:
        assert cli.main(["chat", address]) == 2
    output = capfd.readouterr()
    search(folder, output.out, output.err)


def test_a_traceback_is_masked(folder: Path) -> None:
    code = "import zephyr_ray, os; raise RuntimeError(os.environ['HF_TOKEN'] + ' in a traceback')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "*** in a traceback" in done.stderr
    search(folder, done.stderr)


def test_a_traceback_of_a_thread_is_masked(folder: Path) -> None:
    code = (
        "import zephyr_ray, os, threading\n"
        "def work(): raise RuntimeError(os.environ['HF_TOKEN'] + ' in a thread')\n"
        "threading.Thread(target=work).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: *** in a thread" in done.stderr
    search(folder, done.stderr)


def test_mlflow_stores_no_secret(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    key = CANARIES["HF_TOKEN"]
    settings = {"model": key, "more": {"url": "http://zed:canary-1@h"}}
    (folder / "model").mkdir()
    tracking = Tracking.open(folder, "r", "k", settings)
    client = tracking.client
    done = tracking.start_stage("done", "sft", "k1", settings)
    manifest = Manifest(kind="sft", key="k1", files={}, settings=settings)
    done.finish(Artifact(folder, manifest))
    failed = tracking.start_stage("failed", "sft", "k2", settings)
    failed.fail(f"wrong key {key}")
    for run_id in (tracking.run_id, done.run_id, failed.run_id):
        assert client.get_run(run_id).data.params["model"] == "***"
    assert client.get_run(failed.run_id).data.tags["zephyr.error"] == "wrong key ***"
    [model] = client.search_logged_models([tracking.experiment.id])
    assert model.params["model"] == "***"
    [logged] = (folder / "mlartifacts").rglob("manifest.json")
    assert '"model": "***"' in logged.read_text()
    with monkeypatch.context() as patch:
        # The reason is masked even if no log record factory is installed.
        patch.setattr(logging, "_logRecordFactory", logging.LogRecord)
        with tracking.suppress_errors():
            raise ValueError(f"wrong key {key}")
    assert "MLflow: ValueError: wrong key ***;" in caplog.text
    search(folder, caplog.text)


TEXTS = {
    "http://a:canary@b/c": "http://b/c",
    "at 'postgresql+psycopg2://a:canary@b:5/c'": "at 'postgresql+psycopg2://b:5/c'",
    "https://canary@b": "https://b",
    "no folder http:/a:canary@b": "no folder http:/b",
    "http://a:can@ary@b/c": "http://b/c",
    "http://a:can/canary?ary@b/c": "http://b/c",
    "url: /api?x=1&api_key=canary&y=2": "url: /api?x=1&api_key=***&y=2",
    "s3?X-Amz-Signature=canary": "s3?X-Amz-Signature=***",
    "b'Bearer canary-1\\n'": "b'Bearer ***'",
    "Authorization: Basic Y2FuYXJ5": "Authorization: Basic ***",
    "--set a.password=canary": "--set a.password=***",
    "proxy 'me:canary@proxy:3128'": "proxy '***@proxy:3128'",
    f"http://a:{'canary.' * 90}@b/c": "http://b/c",
    f"https://{'canary.' * 90}@b": "https://b",
    f"http://a:can/ary{'canary.' * 90}@b/c": "http://b/c",
    f"proxy a:{'canary.' * 90}@b": "proxy ***@b",
    "http://a:can@ary/canary@b/c": "http://b/c",
    "http://a:canary@b,http://a:canary@c": "http://b,http://c",
    "user:canary/er2@proxy:3128": "***@proxy:3128",
    "'user:canary'er2@proxy:3128'": "'***@proxy:3128'",
    # Not secrets:
    "host:8000/@c": "host:8000/@c",
    "registry:5000/zephyr:1.0@sha256:ab": "registry:5000/zephyr:1.0@sha256:ab",
    "x/zephyr:1.0@sha256:ab": "x/zephyr:1.0@sha256:ab",
    "zephyr:1.0@sha256:ab": "zephyr:1.0@sha256:ab",
    "http://b:8000/@c and x@y.z": "http://b:8000/@c and x@y.z",
    "http://medium.example/@user": "http://medium.example/@user",
    "max_tokens=5, keys=7": "max_tokens=5, keys=7",
    "Basic arithmetic for the bearer of news": "Basic arithmetic for the bearer of news",
    "api_key_env=MY_KEY": "api_key_env=MY_KEY",
}


@pytest.mark.parametrize("text", TEXTS)
def test_masked_text(text: str) -> None:
    assert masked(text) == TEXTS[text]
    assert masked(masked(text)) == TEXTS[text]
    for kind in (Permanent, Temporary):
        assert str(kind(text)) == TEXTS[text]


def test_a_secret_is_masked_before_it_is_cut(
    api: Api, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "canary " * 30)
    monkeypatch.setattr(masking, "_remembered", set())
    for before in ("", "x" * 150, "x" * 250, "x" * 590):
        text = f"{before} {'canary ' * 30}"
        kube = Kube()._error(400, json.dumps({"message": text}), "/")
        for line in (shorten(text), one_line(text), str(kube)):
            assert "canary" not in line, line


def test_values_are_masked_in_the_forms_that_clients_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", 'ca n/"ary\n')
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:p%40ss/word@db/x")
    login = base64.b64encode(b"me:p@ss/word").decode()
    for form in (
        'ca n/"ary',
        "ca%20n%2F%22ary",
        json.dumps('ca n/"ary\n')[1:-1],
        "p@ss/word",
        login,
    ):
        assert masked(f"x {form} y") == "x *** y"
    monkeypatch.setenv("WEBHOOK", "https://me:hunter22@host/@channel")
    assert masked("x hunter22 y") == "x *** y"
    monkeypatch.setenv("A_SECRET", "x")
    assert masked("x is too short") == "x is too short"


def test_a_log_record_keeps_its_arguments_unless_they_hold_a_secret(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("any").warning("%s of %s", 1, 2)
    logging.getLogger("any").warning("key %s", CANARIES["OPENAI_API_KEY"])
    assert caplog.records[0].args == (1, 2)
    assert [record.getMessage() for record in caplog.records] == ["1 of 2", "key ***"]


def test_credentials_in_a_text() -> None:
    assert has_credentials("see http://a:b@c") and has_credentials("http://c/?key=x")
    assert has_credentials(f"http://a:{'b' * 900}@c")
    assert has_credentials("http://user:123/45SECRET@host/v1")
    assert has_credentials("http://user:pa SECRET@host/v1")
    assert not has_credentials("see http://c:80/v1 or write to a@b")
    assert not has_credentials("http://c/?keys") and not has_credentials("mail a@b?key=c")


def test_parameters_that_are_no_secrets() -> None:
    schema = {"properties": {"key": {"type": "string"}}, "required": ["key", "token"]}
    parameters = {"max_tokens": "5", "response_format": schema, "prompt_cache_key": "zephyr"}
    refuse_secrets({"models": {"judge": {"parameters": parameters}}}, "r.yaml", "…")


def test_shipped_recipes_have_no_credentials() -> None:
    for path in Path(__file__).parent.parent.glob("configs/*.yaml"):
        assert not has_credentials(path.read_text()), path


@pytest.mark.parametrize(
    "text", ["a:/b:c", "a.", "a:/", "&key", "Bearer ", "http://a:b", "a:", "a:b@", "http://a:@"]
)
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    masked(text * 40_000)
    assert time.process_time() - started < 6
