"""Sends the HTTP client's requests through aiohttp, which needs a third of the CPU time of the
client's own transport, because the latter searches all connections for each request."""

import weakref
from contextlib import suppress
from typing import Any

import aiohttp
import httpx2
from httpx2._utils import get_environment_proxies
from yarl import URL

HEADER_BYTES = 1 << 16
"""Maximum bytes per header of a reply."""


def client(timeout: httpx2.Timeout, **arguments: Any) -> httpx2.AsyncClient:
    """Returns an HTTP client. Requests through a proxy use the client's own transport."""
    mounts = {
        pattern: httpx2.AsyncHTTPTransport(proxy=proxy) if proxy else None
        for pattern, proxy in get_environment_proxies().items()
    }
    transport = AiohttpTransport(timeout)
    return httpx2.AsyncClient(timeout=timeout, transport=transport, mounts=mounts, **arguments)


class AiohttpTransport(httpx2.AsyncBaseTransport):
    """Sends requests as they are, and returns complete replies. For one event loop."""

    def __init__(self, timeout: httpx2.Timeout):
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=timeout.connect, sock_read=timeout.read
        )
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        session = self._session = self._session or self._open()
        try:
            async with session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=request.headers.multi_items(),
                data=await request.aread() or None,
                allow_redirects=False,
            ) as reply:
                content = await reply.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise httpx2.ConnectTimeout(str(error)) from error
        except TimeoutError as error:
            raise httpx2.ReadTimeout(str(error)) from error
        except aiohttp.ClientConnectorError as error:
            raise httpx2.ConnectError(str(error)) from error
        except aiohttp.ClientOSError as error:
            raise httpx2.ReadError(str(error)) from error
        except aiohttp.ClientError as error:
            raise httpx2.RemoteProtocolError(str(error)) from error
        return httpx2.Response(reply.status, headers=reply.raw_headers, content=content)

    def _open(self) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=httpx2.create_ssl_context()),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # the client decompresses
            timeout=self._timeout,
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
        )
        # Engines are dropped without being closed, and aiohttp warns about sessions left open. The
        # finalizer holds the session, so that the collector cannot end it before this transport.
        weakref.finalize(self, _close, session)
        return session

    async def aclose(self) -> None:
        if self._session:
            await self._session.close()


def _close(session: aiohttp.ClientSession) -> None:
    """Closes the connections without an event loop, which the first step of the coroutine does."""
    with suppress(StopIteration):
        session.close().send(None)
