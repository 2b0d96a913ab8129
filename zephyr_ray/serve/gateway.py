"""The HTTP side: OpenAI-compatible routes, page, votes and judge, behind keys and bounds."""

import asyncio
import json
import logging
import secrets
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.judges import FORMS, Form
from zephyr_ray.models import constraints
from zephyr_ray.serve.answers import Answer, Format, Models
from zephyr_ray.serve.keys import VARIABLE, Keys, read_keys
from zephyr_ray.serve.requests import (
    RequestError,
    VoteRequest,
    judge_request,
    parse,
)
from zephyr_ray.serve.votes import Votes

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from ray.serve.handle import DeploymentHandle

    Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger("zephyr_ray.serve")

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 1 << 20
"""Of one body."""
OPEN = ("/", "/health")
"""Paths that need no key: the page asks for one itself."""
STATUS_SECONDS = 2.0
"""Between two looks at the replicas: anybody may ask for the health, as often as they like."""


@dataclass(frozen=True)
class Limits:
    requests_per_minute: int
    """Of one key, at one gateway replica."""
    max_tokens: int
    """Of one answer."""
    log_prompts: bool


class Gateway:
    """The ingress deployment. `models` and `judge` are handles of the other deployments."""

    def __init__(
        self,
        models: "dict[str, DeploymentHandle]",
        judge: "DeploymentHandle | None",
        votes: Path,
        formats: dict[str, Format],
        limits: Limits,
        keys_needed: bool,
    ):
        from ray import serve
        from ray.util.metrics import Counter

        self._models = Models(models, formats, limits.max_tokens)
        self._judge, self._limits, self._votes = judge, limits, Votes(votes)
        keys = read_keys()
        if keys_needed and not keys:
            raise Permanent(f"{VARIABLE} is not set in the environment of the gateway's node")
        self._keys = Keys(keys, limits.requests_per_minute)
        self._started = int(time.time())
        self._application = serve.get_replica_context().app_name
        self._asked, self._missing = -STATUS_SECONDS, list[str]()
        # Beside what Serve counts itself; Ray's metrics agent shows both to Prometheus.
        self._count = Counter("zephyr_requests", "Requests answered", ("path", "status"))
        log.setLevel(logging.INFO)
        # Serve writes what stands on standard output into the replica's log.
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.propagate = False

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from fastapi import FastAPI

        app = FastAPI(openapi_url=None)
        for method, path, handler in (
            ("GET", "/", self._page),
            ("GET", "/health", self._health),
            ("GET", "/v1/models", self._list),
            ("GET", "/v1/models/{name}", self._one),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("POST", "/v1/votes", self._vote),
            *(("POST", f"/judge/{name}", self._judging(form)) for name, form in FORMS.items()),
        ):
            app.add_api_route(
                path, self._guarded(handler, path), methods=[method], response_model=None
            )
        for status, handler in ((404, _nothing), (405, _other_method)):
            app.add_exception_handler(status, _as_answer(self._guarded(handler, "other")))
        return app

    def _guarded(self, handler: "Handler", path: str) -> Any:
        """The handler behind key, bounds, log line and OpenAI-shaped errors."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        async def route(request: Request) -> Any:
            began, holder = time.monotonic(), "none"
            request.state.id, request.state.note = f"req-{uuid.uuid4().hex[:16]}", {}
            try:
                self._keys.check_host(request.headers.get("host"))
                if path not in OPEN:
                    holder = self._keys.admit(request.headers.get("authorization"))
                response = await handler(request)
            except Exception as raised:
                error = raised
                if not isinstance(error, RequestError):
                    log.exception("a request failed")
                    error = RequestError(500, "the service failed; see its log", "internal_error")
                response = JSONResponse(error.body(), error.status, error.headers())
                request.state.note["error"] = error.code
            self._count.inc(tags={"path": path, "status": str(response.status_code)})
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

    async def _page(self, request: "Request") -> "Response":
        from fastapi.responses import HTMLResponse

        nonce = secrets.token_urlsafe(16)
        policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors 'none'; style-src 'nonce-{nonce}'; "
            f"script-src 'nonce-{nonce}'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        page = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        return HTMLResponse(page, headers=headers)

    async def _health(self, request: "Request") -> "Response":
        """Ready while every model and the judge have a replica that runs."""
        if time.monotonic() - self._asked > STATUS_SECONDS:
            self._asked, self._missing = time.monotonic(), await asyncio.to_thread(self._not_up)
        if self._missing:
            message = f"no replica runs of {', '.join(self._missing)}"
            raise RequestError(503, message, "not_ready", retry_after=STATUS_SECONDS)
        return _json({"status": "ok", "models": self._models.names})

    def _not_up(self) -> list[str]:
        from ray import serve

        deployments = serve.status().applications[self._application].deployments
        return [name for name, one in deployments.items() if not one.replica_states.get("RUNNING")]

    async def _list(self, request: "Request") -> "Response":
        return _json({"object": "list", "data": [self._card(n) for n in self._models.names]})

    async def _one(self, request: "Request") -> "Response":
        name = request.path_params["name"]
        self._models.handle(name)
        return _json(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "zephyr_ray"}

    async def _chat(self, request: "Request") -> "Response":
        answer = await self._models.chat(await _body(request), request.state.id)
        return self._respond(request, answer)

    async def _complete(self, request: "Request") -> "Response":
        answer = await self._models.complete(await _body(request), request.state.id)
        return self._respond(request, answer)

    def _respond(self, request: "Request", answer: Answer) -> "Response":
        from fastapi.responses import StreamingResponse

        request.state.note["model"] = answer.model
        if self._limits.log_prompts:
            request.state.note["prompt"] = answer.prompt
        if answer.events is None:
            return _json(answer.whole)
        return StreamingResponse(answer.events, media_type="text/event-stream")

    async def _vote(self, request: "Request") -> "Response":
        vote = parse(VoteRequest, await _body(request))
        if vote.messages[-1].role != "user":
            raise RequestError(422, "messages: must end with a question", "invalid_value")
        try:
            return _json({"id": await asyncio.to_thread(self._votes.add, vote)})
        except OSError as error:
            raise RequestError(507, f"the vote cannot be kept: {error}", "no_storage") from None

    def _judging(self, form: Form) -> "Handler":
        """Returns the handler of one judge form."""
        body = judge_request(form.fields)

        async def handler(request: "Request") -> "Response":
            asked = parse(body, await _body(request)).requests
            answers = [[getattr(a, name).model_dump() for name in form.fields] for a in asked]
            rows = [one.row() for one in asked]
            return await self._judged(form.name, list(zip(rows, answers, strict=True)))

        return handler

    async def _judged(self, form: str, rows: list[tuple[Any, ...]]) -> "Response":
        """Returns judgements in the order of the rows."""
        if self._judge is None:
            raise RequestError(404, "this run was compared by no judge", "no_judge")
        for number, (row, *_) in enumerate(rows):
            try:
                if row["constraint"]:
                    constraints.validate(row["constraint"])
            except Permanent as error:
                place = f"requests.{number}.constraint"
                raise RequestError(422, f"{place}: {error}", "invalid_value", place) from None
        import ray
        from ray.serve.exceptions import RayServeException

        calls = [self._judge.judge.remote(form, *row) for row in rows]
        try:
            return _json({"results": await asyncio.gather(*calls)})
        except ray.exceptions.RayTaskError as error:
            # Its text is a remote traceback; what the client may know is the cause's.
            if isinstance(error.cause, Permanent):
                raise RequestError(422, f"the judge: {error.cause}", "judge_refused") from None
            if not isinstance(error.cause, Temporary):
                raise
            message = f"the judge: {error.cause}"
            raise RequestError(503, message, "judge_busy", retry_after=5) from None
        except (ray.exceptions.RayError, RayServeException):
            raise RequestError(503, "the judge was lost", "judge_lost", retry_after=5) from None
        finally:
            # Of a client that left, or beside one that failed; after their end this does nothing.
            for call in calls:
                call.cancel()


async def _body(request: "Request") -> bytes:
    """The whole body, never more than MOST_BYTES in memory."""
    parts, total = [], 0
    async for part in request.stream():
        total += len(part)
        if total > MOST_BYTES:
            message = f"the body is larger than {MOST_BYTES} bytes"
            raise RequestError(413, message, "body_too_large")
        parts.append(part)
    return b"".join(parts)


def _json(content: Any) -> "Response":
    from fastapi.responses import JSONResponse

    return JSONResponse(content)


def _as_answer(route: Any) -> Any:
    async def answer(request: Any, _: Exception) -> Any:
        return await route(request)

    return answer


async def _nothing(request: "Request") -> "Response":
    path = request.url.path[:64]
    hint = f"; OpenAI's are at /v1{path}" if path.startswith(("/chat", "/comp", "/mod")) else ""
    raise RequestError(404, f"nothing at {path}{hint}", "not_found")


async def _other_method(request: "Request") -> "Response":
    message = f"no {request.method} at {request.url.path[:64]}"
    raise RequestError(405, message, "method_not_allowed")
