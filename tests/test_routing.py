"""Tests the gateway's routes: who may send a request, what is logged, and a gateway that needs
keys."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request, Response
from fastapi.testclient import TestClient

from zephyr_ray.errors import Permanent
from zephyr_ray.serve.dispatcher import Dispatcher, ModelResponse
from zephyr_ray.serve.gateway import Gateway, Limits, respond
from zephyr_ray.serve.keys import Keys
from zephyr_ray.serve.routing import build_app, read_body
from zephyr_ray.serve.vote_file import VoteFile

KEY = "one-long-key"
PROMPT = [{"role": "user", "content": "sesame"}]


def logged(caplog: pytest.LogCaptureFixture, log_prompts: bool) -> dict[str, object]:
    """Returns the log line of one answered chat."""

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


def test_a_request_is_logged_in_a_line_without_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, log_prompts=False) == LINE


def test_the_prompt_is_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, log_prompts=True) == {**LINE, "prompt": PROMPT}


ADDRESS, JSON = "http://127.0.0.1:8000", {"Content-Type": "application/json"}


def client(keys: list[str], address: str = ADDRESS) -> TestClient:
    """Returns a client of a service whose votes change state, to test requests from browsers."""

    async def vote(request: Request) -> Response:
        return Response(await read_body(request))

    routes = [("POST", "/v1/votes", vote), ("GET", "/v1/models", vote), ("GET", "/health", page)]
    return TestClient(build_app(routes, Keys(keys, per_minute=99)), base_url=address)


async def page(request: Request) -> Response:
    return Response("ok")


@pytest.mark.parametrize("keys", [[], [KEY]])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "http://127.0.0.1:8000.evil.example"},
        {"Origin": "ftp://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_from_elsewhere_may_not_send_requests(
    headers: dict[str, str], keys: list[str]
) -> None:
    sent = {**JSON, **headers, "Authorization": f"Bearer {KEY}"}
    reply = client(keys).post("/v1/votes", content=b"{}", headers=sent)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "wrong_origin")
    assert client(keys).get("/v1/models", headers=sent).status_code == 403
    assert client(keys).get("/health", headers=sent).status_code == 200
    preflight = client(keys).options("/v1/votes", headers=sent)
    assert preflight.status_code >= 400
    assert not any(name.startswith("access-control") for name in preflight.headers)


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        (ADDRESS, None),
        (ADDRESS, ADDRESS),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_its_own_page_and_other_clients_may_send_requests(address: str, origin: str | None) -> None:
    headers = {**JSON, **({"Origin": origin, "Sec-Fetch-Site": "same-origin"} if origin else {})}
    assert client([], address).post("/v1/votes", content=b"{}", headers=headers).text == "{}"


@pytest.mark.parametrize("host", ["chat.example", "chat.example:443", "CHAT.example"])
def test_its_own_page_may_send_requests_behind_a_tls_proxy(host: str) -> None:
    sent = {"Host": host, "Origin": "https://chat.example", "Authorization": f"Bearer {KEY}"}
    reply = client([KEY]).post("/v1/votes", content=b"{}", headers={**JSON, **sent})
    assert reply.status_code == 200


@pytest.mark.parametrize("keys", [[], [KEY]])
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=a",
    ],
)
def test_a_body_must_be_declared_as_json(content_type: str | None, keys: list[str]) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    if content_type is not None:
        headers["Content-Type"] = content_type
    reply = client(keys).post("/v1/votes", content=b"{}", headers=headers)
    assert reply.status_code == 415
    assert "send Content-Type: application/json" in reply.json()["error"]["message"]


def test_json_may_name_its_charset() -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client([]).post("/v1/votes", content=b"{}", headers=headers).status_code == 200


def test_a_get_route_also_answers_head() -> None:
    assert client([]).head("/health").status_code == 200


def test_an_internal_error_does_not_show_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def chat(request: Request) -> Response:
        raise KeyError("a secret")

    app = build_app([("POST", "/v1/chat/completions", chat)], Keys([KEY], per_minute=9))
    reply = TestClient(app).post("/v1/chat/completions", headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "internal_error"


def test_a_gateway_that_needs_keys_does_not_start_without_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ZEPHYR_API_KEYS", raising=False)
    limits = Limits(requests_per_minute=9, max_tokens=9, log_prompts=False)
    with pytest.raises(Permanent, match="ZEPHYR_API_KEYS is not set"):
        Gateway({}, None, tmp_path / "votes.jsonl", {}, limits, keys_needed=True)


@pytest.fixture
def voters(tmp_path: Path) -> TestClient:
    """Returns a client of the vote routes of a gateway that serves the model dpo."""
    gateway, dispatcher = object.__new__(Gateway), object.__new__(Dispatcher)
    dispatcher._handles = {"dpo": None}  # type: ignore[dict-item]
    gateway._dispatcher, gateway._votes = dispatcher, VoteFile(tmp_path)
    routes: list[tuple[str, str, Any]] = [
        ("POST", "/v1/votes", gateway._vote),
        ("DELETE", "/v1/votes/{id}", gateway._withdraw_vote),
    ]
    return TestClient(build_app(routes, Keys([], per_minute=9)), base_url=ADDRESS)


def test_a_vote_is_taken_back_by_its_id(voters: TestClient) -> None:
    owl = {"model": "dpo", "text": "An owl."}
    vote = {"messages": PROMPT, "left": owl, "right": owl, "vote": "left", "blind": True}
    row_id = voters.post("/v1/votes", json=vote).json()["id"]
    for _ in range(2):  # a client that lost the first reply retries
        reply = voters.delete(f"/v1/votes/{row_id}")
        assert (reply.status_code, reply.json()) == (200, {"id": row_id, "withdrawn": True})


def test_a_vote_that_was_never_stored_cannot_be_taken_back(voters: TestClient) -> None:
    reply = voters.delete("/v1/votes/v0")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "vote_not_found")
    message = "no vote 'v0'; use an id that POST /v1/votes returned"
    assert reply.json()["error"]["message"] == message


def test_a_vote_about_a_model_that_is_not_served_is_refused(voters: TestClient) -> None:
    """Votes become training data, so both answers must be from served models."""
    served, other = ({"model": name, "text": "An owl."} for name in ("dpo", "zzz"))
    vote = {"messages": PROMPT, "left": served, "right": served, "vote": "left"}
    replies = [voters.post("/v1/votes", json=vote | {"right": side}) for side in (served, other)]
    assert [reply.status_code for reply in replies] == [200, 404]
    assert "'zzz' not found; use one of dpo" in replies[1].json()["error"]["message"]
