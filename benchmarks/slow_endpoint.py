"""Simulates, in its own process, an OpenAI-compatible endpoint that answers every request after a
fixed time; also a bare client that only sends and receives.

    .venv/bin/python -m benchmarks.slow_endpoint SECONDS     prints its port
"""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "peer",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Bridges carry trains over rivers. " * 15},
        }
    ],
    "usage": {"prompt_tokens": 50, "completion_tokens": 100, "total_tokens": 150},
}
REQUEST = {"model": "peer", "messages": [{"role": "user", "content": "Write about bridges. " * 10}]}
END = b"\r\n\r\n"


@contextmanager
def slow_endpoint(seconds: float) -> Iterator[str]:
    """Runs an endpoint with this latency; yields its address."""
    command = [sys.executable, "-m", "benchmarks.slow_endpoint", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def arrivals(address: str) -> list[float]:
    """Returns the arrival times of requests, by the clock that all processes share."""
    with urllib.request.urlopen(f"{address}/arrivals") as reply:
        times: list[float] = json.load(reply)
        return times


async def bare_rate(address: str, in_flight: int, requests: int) -> float:
    """Returns the requests per second that bare connections reach."""
    body = json.dumps(REQUEST).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d" % len(body) + END + body
    length = len(_reply(json.dumps(ANSWER).encode()))
    host, _, port = address.removeprefix("http://").partition(":")
    waiting = iter(range(requests))

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in waiting:
            writer.write(request)
            await reader.readexactly(length)
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(in_flight)))
    return requests / (time.monotonic() - began)


def _reply(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d" % len(body)
    return head + END + body


async def _serve(seconds: float) -> None:
    loop, reply, times = asyncio.get_running_loop(), _reply(json.dumps(ANSWER).encode()), []

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport, self.received = transport, b""

        def data_received(self, data: bytes) -> None:
            self.received += data
            head, end, rest = self.received.partition(END)
            if not end:
                return
            if head.startswith(b"GET"):
                self.transport.write(_reply(json.dumps(times).encode()))
                self.transport.close()
                return
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
            if len(rest) == length:  # a client sends its next request after the reply
                self.received = b""
                times.append(time.monotonic())
                loop.call_later(seconds, self.transport.write, reply)

    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
