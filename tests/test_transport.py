"""Tests the transport of the endpoint client: replies, proxies, errors, and its end."""

import asyncio
import gc
import gzip
import socket
import threading
from typing import Any

import httpx2
import pytest

from zephyr_ray.engines import transport
from zephyr_ray.engines.openai import OpenAISettings


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class Peer:
    """A server that sends these bytes to its only client, or nothing if they are None."""

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


def post(address: str, read: float = 5.0) -> httpx2.Response:
    async def main() -> httpx2.Response:
        client = transport.client(httpx2.Timeout(read), base_url=address)
        async with asyncio.timeout(20):
            return await client.request("POST", "/a", json={"b": 1})

    return asyncio.run(main())


def test_a_compressed_reply_is_read() -> None:
    peer = Peer(reply(gzip.compress("ä".encode()), "Content-Encoding: gzip", "X-Id: 1"))
    response = post(peer.address)
    assert response.text == "ä" and response.headers["x-id"] == "1"


def test_requests_have_the_headers_of_the_client_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEPHYR_TEST_KEY", "sk-1")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    peer = Peer(reply(b"{}"))

    async def main() -> Any:
        settings = OpenAISettings(
            model="m", base_url=f"{peer.address}/v1", api_key_env="ZEPHYR_TEST_KEY"
        )
        return await settings.client().request("POST", "/a", json={"b": 1})

    asyncio.run(main())
    head, _, body = peer.received.partition(b"\r\n\r\n")
    line, *headers = head.decode().lower().split("\r\n")
    values = dict(header.split(": ", 1) for header in headers)
    assert line == "post /v1/a http/1.1" and body == b'{"b":1}'
    assert values["authorization"] == "bearer sk-1"
    assert values["openai-organization"] == "org-1"
    assert values["content-type"] == values["accept"] == "application/json"
    assert len(headers) == len(values)


def test_a_proxy_variable_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(reply(b"through"))
    monkeypatch.setenv("HTTP_PROXY", peer.address)
    assert post("http://other.example").text == "through"
    assert peer.received.startswith(b"POST http://other.example/a ")


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (None, httpx2.ReadTimeout),
        (b"", httpx2.RemoteProtocolError),
        (b"Hello\r\n\r\n", httpx2.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", httpx2.RemoteProtocolError),
    ],
    ids=["silent", "closes", "no HTTP", "breaks off"],
)
def test_errors_are_those_of_the_client(sent: bytes | None, error: type[Exception]) -> None:
    peer = Peer(sent)
    with pytest.raises(error):
        post(peer.address, read=0.2)


def test_a_refused_connection_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(httpx2.ConnectError):
        post(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_dropped_client_closes_its_connections_silently(
    caplog: pytest.LogCaptureFixture, cyclic: bool
) -> None:
    gc.collect()  # what earlier tests left behind
    caplog.clear()

    async def main() -> None:
        peer = Peer(reply(b"{}"))
        client = transport.client(httpx2.Timeout(5.0), base_url=peer.address)
        await client.request("POST", "/a", json={})
        if cyclic:
            session = client._transport._session
            session.owners = [session, client]
        del client
        gc.collect()

    asyncio.run(main())
    gc.collect()
    assert not caplog.records
