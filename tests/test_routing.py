"""The gateway's routes: what a request leaves in the log, and a gateway that needs keys."""

import json
import logging
from pathlib import Path

import pytest
from fastapi import Request, Response
from fastapi.testclient import TestClient

from zephyr_ray.errors import Permanent
from zephyr_ray.serve.dispatcher import ModelResponse
from zephyr_ray.serve.gateway import Gateway, Limits, respond
from zephyr_ray.serve.keys import Keys
from zephyr_ray.serve.routing import build_app

KEY = "one-long-key"
PROMPT = [{"role": "user", "content": "sesame"}]


def logged(caplog: pytest.LogCaptureFixture, log_prompts: bool) -> dict[str, object]:
    """The log line of one answered chat."""

    async def chat(request: Request) -> Response:
        return respond(request, ModelResponse("dpo", PROMPT, body={"id": "1"}), log_prompts)

    app = build_app([("POST", "/v1/chat/completions", chat)], Keys([KEY], per_minute=9))
    with caplog.at_level(logging.INFO, "zephyr_ray.serve"):
        reply = TestClient(app).post(
            "/v1/chat/completions",
            headers={"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"},
        )
    assert reply.json() == {"id": "1"}
    [record] = [record for record in caplog.records if record.name == "zephyr_ray.serve"]
    line: dict[str, object] = json.loads(record.getMessage())
    assert KEY not in record.getMessage() and line.pop("seconds_to_response") is not None
    return line


LINE = {
    "id": "mine",
    "key": "eef79831",  # the start of the key's SHA-256
    "method": "POST",
    "path": "/v1/chat/completions",
    "status": 200,
    "model": "dpo",
}


def test_a_request_leaves_a_line_without_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, log_prompts=False) == LINE


def test_the_prompt_is_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, log_prompts=True) == {**LINE, "prompt": PROMPT}


def test_an_error_of_the_service_does_not_show_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def chat(request: Request) -> Response:
        raise KeyError("a secret")

    app = build_app([("POST", "/v1/chat/completions", chat)], Keys([KEY], per_minute=9))
    reply = TestClient(app).post("/v1/chat/completions", headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "internal_error"


def test_a_gateway_that_needs_keys_does_not_start_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ZEPHYR_API_KEYS", raising=False)
    limits = Limits(requests_per_minute=9, max_tokens=9, log_prompts=False)
    with pytest.raises(Permanent, match="ZEPHYR_API_KEYS is not set"):
        Gateway({}, None, tmp_path / "votes.jsonl", {}, limits, keys_needed=True)
