"""Routes as an HTTP application: each behind a host check, keys, a log line and OpenAI's errors."""

import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from zephyr_ray.serve.keys import Keys
from zephyr_ray.serve.requests import RequestError

log = logging.getLogger("zephyr_ray.serve")

Handler = Callable[[Request], Awaitable[Response]]
MOST_BYTES = 1 << 20
"""Of one body."""
OPEN = ("/", "/health")
"""Paths that need no key: the page asks for one itself."""


def build_app(routes: list[tuple[str, str, Handler]], keys: Keys) -> FastAPI:
    """An application of (method, path, handler) routes."""
    from ray.util.metrics import Counter

    # Beside what Serve counts itself; Ray's metrics agent shows both to Prometheus.
    count = Counter("zephyr_requests", "Requests answered", ("path", "status"))
    app = FastAPI(openapi_url=None)
    for method, path, handler in routes:
        route = _guarded(handler, path, keys, count)
        app.add_api_route(path, route, methods=[method], response_model=None)
    for status, handler in ((404, _nothing), (405, _other_method)):
        app.add_exception_handler(status, _as_answer(_guarded(handler, "other", keys, count)))
    return app


async def read_body(request: Request) -> bytes:
    """The whole body, never more than MOST_BYTES in memory."""
    parts, total = [], 0
    async for part in request.stream():
        total += len(part)
        if total > MOST_BYTES:
            message = f"the body is larger than {MOST_BYTES} bytes"
            raise RequestError(413, message, "body_too_large")
        parts.append(part)
    return b"".join(parts)


def _guarded(handler: Handler, path: str, keys: Keys, count: Any) -> Handler:
    """The handler behind key, bounds, log line and OpenAI-shaped errors."""

    async def route(request: Request) -> Response:
        began, holder = time.monotonic(), "none"
        request.state.id, request.state.note = f"req-{uuid.uuid4().hex[:16]}", {}
        try:
            keys.check_host(request.headers.get("host"))
            if path not in OPEN:
                holder = keys.admit(request.headers.get("authorization"))
            response = await handler(request)
        except Exception as raised:
            error = raised
            if not isinstance(error, RequestError):
                log.exception("a request failed")
                error = RequestError(500, "the service failed; see its log", "internal_error")
            response = JSONResponse(error.body(), error.status, error.headers())
            request.state.note["error"] = error.code
        count.inc(tags={"path": path, "status": str(response.status_code)})
        line = {
            # Serve sends this one back as X-Request-Id; a client may have chosen it.
            "id": request.headers.get("x-request-id", "")[:64],
            "key": holder,
            "method": request.method,
            "path": path,
            "status": response.status_code,
            "seconds_to_response": round(time.monotonic() - began, 3),
            **request.state.note,
        }
        log.info("%s", json.dumps(line, ensure_ascii=False))
        return response

    return route


def _as_answer(route: Handler) -> Any:
    async def answer(request: Request, _: Exception) -> Response:
        return await route(request)

    return answer


async def _nothing(request: Request) -> Response:
    path = request.url.path[:64]
    hint = f"; OpenAI's are at /v1{path}" if path.startswith(("/chat", "/comp", "/mod")) else ""
    raise RequestError(404, f"nothing at {path}{hint}", "not_found")


async def _other_method(request: Request) -> Response:
    message = f"no {request.method} at {request.url.path[:64]}"
    raise RequestError(405, message, "method_not_allowed")
