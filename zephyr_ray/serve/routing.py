"""Builds the HTTP application; each route checks host, origin and key, and logs one line per
request."""

import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from zephyr_ray.serve.keys import Keys
from zephyr_ray.serve.request_error import RequestError

log = logging.getLogger("zephyr_ray.serve")

Handler = Callable[[Request], Awaitable[Response]]
MAX_BODY_BYTES = 1 << 20
"""Maximum size of one request body."""
KEYLESS_PATHS = ("/", "/health")
"""Paths that need no key and that any page may link to; the page asks the user for a key itself."""


def build_app(routes: list[tuple[str, str, Handler]], keys: Keys) -> FastAPI:
    """Returns an application with the given (method, path, handler) routes."""
    from ray.util.metrics import Counter

    # Ray's metrics agent exports it to Prometheus, beside Serve's own metrics.
    count = Counter("zephyr_requests", "Requests answered", ("path", "status"))
    app = FastAPI(openapi_url=None)
    for method, path, handler in routes:
        route = _guarded(handler, path, keys, count)
        methods = [method, "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, route, methods=methods, response_model=None)
    for status, handler in ((404, _not_found), (405, _method_not_allowed)):
        app.add_exception_handler(
            status, _exception_handler(_guarded(handler, "other", keys, count))
        )
    return app


def check_origin(request: Request) -> None:
    """Raises RequestError 403 if a browser sends the request on behalf of another origin's page.

    Any page in a browser on this machine can send requests to a service without keys, and votes
    become training data. Clients other than browsers send neither Origin nor Sec-Fetch-Site.
    """
    origin, host = request.headers.get("origin"), request.headers.get("host", "").lower()
    own = {
        *(f"http://{host}", f"http://{host.removesuffix(':80')}"),
        *(f"https://{host}", f"https://{host.removesuffix(':443')}"),
    }
    elsewhere = origin is not None and origin.lower() not in own
    if elsewhere or request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        message = (
            f"a page from {origin or 'elsewhere'} may not use {host}; use the service's own page, "
            "or make the proxy pass on the Host header"
        )
        raise RequestError(403, message, "wrong_origin")


async def read_body(request: Request) -> bytes:
    """Reads a JSON body.

    Raises RequestError 415 for any other content type, because browsers send those for any page
    without a preflight; 413 before more than MAX_BODY_BYTES are in memory.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"the content type is '{content_type}'; send Content-Type: application/json"
        raise RequestError(415, message, "unsupported_media_type")
    parts, total = [], 0
    async for part in request.stream():
        total += len(part)
        if total > MAX_BODY_BYTES:
            message = f"the body is larger than {MAX_BODY_BYTES} bytes; shorten it"
            raise RequestError(413, message, "body_too_large")
        parts.append(part)
    return b"".join(parts)


def _guarded(handler: Handler, path: str, keys: Keys, count: Any) -> Handler:
    """Wraps a handler with checks of host, origin and key, a metric, a log line, and errors in
    OpenAI's shape."""

    async def route(request: Request) -> Response:
        began, key_name = time.monotonic(), "none"
        request.state.id, request.state.note = f"req-{uuid.uuid4().hex[:16]}", {}
        try:
            keys.check_host(request.headers.get("host"))
            if path not in KEYLESS_PATHS:
                check_origin(request)
                key_name = keys.admit(request.headers.get("authorization"))
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
            # Serve returns this id as X-Request-Id; the client may have chosen it.
            "id": request.headers.get("x-request-id", "")[:64],
            "key": key_name,
            "method": request.method,
            "path": path,
            "status": response.status_code,
            "seconds_to_response": round(time.monotonic() - began, 3),
            **request.state.note,
        }
        log.info("%s", json.dumps(line, ensure_ascii=False))
        return response

    return route


def _exception_handler(route: Handler) -> Any:
    async def handle(request: Request, _: Exception) -> Response:
        return await route(request)

    return handle


async def _not_found(request: Request) -> Response:
    path = request.url.path[:64]
    hint = f"; use /v1{path}" if path.startswith(("/chat", "/comp", "/mod")) else ""
    raise RequestError(404, f"nothing at {path}{hint}", "not_found")


async def _method_not_allowed(request: Request) -> Response:
    message = f"{request.url.path[:64]} does not accept {request.method}"
    raise RequestError(405, message, "method_not_allowed")
