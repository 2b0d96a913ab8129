"""Fakes an OpenAI-compatible endpoint on 127.0.0.1, in a thread."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One HTTP reply; a dictionary is sent as JSON."""

    status: int = 200
    body: Any = ""
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = ""


def completion(
    text: str | None = "Good day.", finish_reason: str | None = "stop"
) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "peer",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


def error(status: int, message: str = "It broke.", **more: Any) -> Answer:
    return Answer(status, {"error": {"message": message, **more}})


GOOD = Answer(200, completion())
HTML = Answer(200, "<!doctype html><title>Log in</title>")
NO_CREDITS = error(402, "Insufficient credits", code=402)


@dataclass
class Endpoint:
    """A running endpoint. `reply` gets the number of the request and its body."""

    url: str
    reply: Callable[[int, dict[str, Any]], Answer]
    models: Answer = field(default_factory=lambda: Answer(404, "not here"))
    """The reply to GET /models."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the POST requests."""


class Server(ThreadingHTTPServer):
    """A server at which many clients can connect at once, even while it is paused."""

    request_queue_size = 128


@contextmanager
def closed_port() -> Iterator[int]:
    """Yields a port of 127.0.0.1 that refuses connections and that no other program can take."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


@contextmanager
def endpoint(reply: Callable[[int, dict[str, Any]], Answer]) -> Iterator[Endpoint]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(running.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running.bodies.append(body)
                number = len(running.bodies) - 1
            self._send(running.reply(number, body))

        def _send(self, answer: Answer) -> None:
            is_text = isinstance(answer.body, str)
            data = answer.body.encode() if is_text else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            kind = "text/html" if is_text else "application/json"
            headers = {
                "Content-Type": answer.content_type or kind,
                "Content-Length": str(len(data)),
            }
            for name, value in (headers | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            # Tests set a Content-Length above the body's to simulate a reply that breaks off.
            self.close_connection = "Content-Length" in answer.headers

    server = Server(("127.0.0.1", 0), Handler)
    running = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", reply)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
