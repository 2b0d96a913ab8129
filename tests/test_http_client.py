"""Tests the HTTP client of endpoints: replies, headers, proxies, errors, and closing."""

import asyncio
import base64
import gc
import gzip
import re
import socket
import threading
from typing import Any

import pytest
from fake_endpoint import closed_port

from zephyr_ray.engines import http_client
from zephyr_ray.engines.http_client import HttpClient, HttpReply
from zephyr_ray.engines.openai import OpenAIEngine, OpenAISettings
from zephyr_ray.engines.replies import NotSent, Unavailable


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class Peer:
    """A server that sends given bytes to its only client, or never replies if they are None."""

    def __init__(self, sent: bytes | None):
        self.received, self._sent = b"", sent
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self._connection, _ = self._listener.accept()
        self.received = self._connection.recv(9999)
        if self._sent is not None:
            self._connection.sendall(self._sent)
            self._connection.close()


def reply(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def post(address: str) -> HttpReply:
    async def main() -> HttpReply:
        engine = OpenAIEngine(OpenAISettings(model="m", base_url=address))
        async with asyncio.timeout(60):
            return await engine._endpoint.call("POST", "/a", json={"b": 1})

    return asyncio.run(main())


def test_a_compressed_reply_is_read() -> None:
    peer = Peer(reply(gzip.compress("ä".encode()), "Content-Encoding: gzip", "X-Id: 1"))
    answer = post(peer.address)
    assert answer.text == "ä" and answer.headers["x-id"] == "1"


def test_each_header_of_the_client_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEPHYR_TEST_KEY", "sk-1")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    peer = Peer(reply(b"{}"))

    async def main() -> Any:
        settings = OpenAISettings(
            model="m", base_url=f"{peer.address}/v1", api_key_env="ZEPHYR_TEST_KEY"
        )
        return await settings.client().send("POST", "/a", json={"b": "ä"})

    asyncio.run(main())
    head, _, body = peer.received.partition(b"\r\n\r\n")
    line, *headers = head.decode().lower().split("\r\n")
    values = dict(header.split(": ", 1) for header in headers)
    assert line == "post /v1/a http/1.1" and body == '{"b":"ä"}'.encode()
    assert values["authorization"] == "bearer sk-1"
    assert values["openai-organization"] == "org-1"
    assert values["content-type"] == values["accept"] == "application/json"
    assert values["user-agent"].startswith("openai/")
    assert len(headers) == len(values)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_variable_is_used(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(reply(b"through"))
    monkeypatch.setenv(variable, peer.address.replace("://", "://me:w%C3%B6rd@"))
    assert post("http://other.example/v1").text == "through"
    assert peer.received.startswith(b"POST http://other.example/v1/a ")
    login = base64.b64encode("me:wörd".encode())
    assert b"Proxy-Authorization: Basic " + login in peer.received


@pytest.mark.parametrize("exempt", ["127.0.0.1", "*", "localhost,127.0.0.1", "127.0.0.1:PORT"])
def test_addresses_in_no_proxy_bypass_it(exempt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(reply(b"direct"))
    monkeypatch.setenv("HTTP_PROXY", "htp://no proxy")
    monkeypatch.setenv("NO_PROXY", exempt.replace("PORT", peer.address.rpartition(":")[2]))
    assert post(peer.address).text == "direct"


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (None, "no reply .*[Tt]imeout"),
        (b"", "no reply .*disconnected"),
        (b"Hello\r\n\r\n", "no reply .*status line"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "no reply .*not completed"),
    ],
    ids=["silent", "closes", "no HTTP", "breaks off"],
)
def test_an_incomplete_reply_may_have_cost_something(
    sent: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sent is None:
        monkeypatch.setattr(http_client, "TIMEOUT_SECONDS", 0.2)
    peer = Peer(sent)
    with pytest.raises(Unavailable, match=says) as raised:
        post(peer.address)
    assert not isinstance(raised.value, NotSent)


def test_a_slow_reply_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zephyr_ray.engines.endpoint.WAIT_SECONDS", 0.2)
    peer = Peer(None)
    with pytest.raises(Unavailable, match="no complete reply in 0.2 s") as raised:
        post(peer.address)
    assert not isinstance(raised.value, NotSent)


@pytest.mark.parametrize("through", ["proxy", "directly"])
def test_a_refused_connection_cost_nothing(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as port:
        address = f"http://127.0.0.1:{port}"
        if through == "proxy":
            monkeypatch.setenv("HTTP_PROXY", address)
            address = "http://other.example"
        with pytest.raises(NotSent):
            post(address)


@pytest.mark.parametrize("login", ["", "me:word@"])
def test_a_proxy_that_refuses_an_https_endpoint_cost_nothing(
    login: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(b"HTTP/1.1 407 Who?\r\nContent-Length: 0\r\n\r\n")
    monkeypatch.setenv("HTTPS_PROXY", peer.address.replace("://", f"://{login}"))
    with pytest.raises(NotSent, match="407") as raised:
        post("https://other.example/v1")
    assert "word" not in str(raised.value)
    assert peer.received.startswith(b"CONNECT other.example:443 ")
    sent = re.findall(b"authorization: (.*)\r", peer.received.lower())
    assert sent == ([b"basic bwu6d29yza=="] if login else [])  # and not the endpoint's key


def test_a_redirect_is_not_followed() -> None:
    peer = Peer(b"HTTP/1.1 307 Away\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n")
    assert post(peer.address).status == 307


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_dropped_client_closes_its_connections_silently(
    caplog: pytest.LogCaptureFixture, cyclic: bool
) -> None:
    gc.collect()  # what earlier tests left behind
    caplog.clear()

    async def main() -> None:
        peer = Peer(reply(b"{}"))
        client = HttpClient(peer.address, {}, proxy=None)
        await client.send("POST", "/a", json={})
        if cyclic:
            session: Any = client._session
            session.owners = [session, client]
        del client
        gc.collect()

    asyncio.run(main())
    gc.collect()
    assert not caplog.records
