"""Sends requests to one endpoint through aiohttp, which needs a third of the CPU time of the OpenAI
client's transport, because the latter searches all connections for each request."""

import json
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import aiohttp
import httpx2
from yarl import URL

TIMEOUT_SECONDS, CONNECT_SECONDS = 120, 15
"""Maximum seconds without a byte of the reply, and to connect."""
HEADER_BYTES = 1 << 16
"""Maximum bytes per header of a reply."""
NOT_SENT = (
    *(aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError),
    aiohttp.ClientHttpProxyError,  # the proxy refused the connection to an https endpoint
)
"""Errors of requests that did not reach the endpoint."""
NO_REPLY = (aiohttp.ClientError, TimeoutError)
"""Errors of requests without a complete reply, including NOT_SENT."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A complete reply."""

    status: int
    headers: Mapping[str, str]
    """Case-insensitive."""
    text: str


class HttpClient:
    """Sends requests with the same headers. For one event loop."""

    def __init__(self, base_url: str, headers: Mapping[str, str], proxy: str | None):
        # Parsing an address takes longer than the rest of building a request.
        self._url = cache(lambda path: URL(base_url.rstrip("/") + path))
        self._options: dict[str, Any] = {"headers": headers, "allow_redirects": False}
        if proxy:
            address = URL(proxy)
            self._options["proxy"] = address.with_user(None)
            if address.user is not None:
                # For http, the login is part of each request; for https, of the CONNECT request.
                part = "proxy_headers" if base_url.startswith("https:") else "headers"
                login = aiohttp.encode_basic_auth(address.user, address.password or "")
                own = self._options.get(part, {})
                self._options[part] = {**own, "Proxy-Authorization": login}
        self._session: aiohttp.ClientSession | None = None

    async def send(self, method: str, path: str, **request: Any) -> HttpReply:
        """Returns the reply, whatever its status; `request` are aiohttp's `json`, `data` or
        `params`. Raises an error of NO_REPLY if there is no complete one."""
        session = self._session = self._session or self._open()
        # Per request: aiohttp would also send a session's headers, with the key, to the proxy.
        async with session.request(method, self._url(path), **self._options, **request) as reply:
            return HttpReply(reply.status, reply.headers, await reply.text(errors="replace"))

    def _open(self) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=httpx2.create_ssl_context()),
            cookie_jar=aiohttp.DummyCookieJar(),
            json_serialize=json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode,
            max_field_size=HEADER_BYTES,
            max_line_size=HEADER_BYTES,
            timeout=aiohttp.ClientTimeout(
                total=None, connect=CONNECT_SECONDS, sock_read=TIMEOUT_SECONDS
            ),
        )
        # Engines are dropped without being closed, and aiohttp warns about sessions left open. The
        # finalizer holds the session, so that the collector cannot end it before this client.
        weakref.finalize(self, _close, session)
        return session


def _close(session: aiohttp.ClientSession) -> None:
    """Closes the connections without an event loop: the first step of the coroutine does it."""
    with suppress(StopIteration):
        session.close().send(None)
