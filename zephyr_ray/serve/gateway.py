"""Defines the ingress deployment: handlers for page, OpenAI-compatible routes, votes and judge."""

import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent, RowError, Temporary
from zephyr_ray.judges import FORMS, Form
from zephyr_ray.models.checks import load_chat_format
from zephyr_ray.serve.dispatcher import Dispatcher, ModelResponse
from zephyr_ray.serve.judge import NoForm
from zephyr_ray.serve.keys import KEYS_VARIABLE, Keys, read_keys
from zephyr_ray.serve.request_error import RequestError
from zephyr_ray.serve.requests import VoteRequest, judge_request, parse
from zephyr_ray.serve.routing import Handler, build_app, read_body
from zephyr_ray.serve.vote_file import UnknownVote, VoteFile

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger("zephyr_ray.serve")

T = TypeVar("T")
PAGE = Path(__file__).with_name("page.html")
STATUS_SECONDS = 2.0
"""Seconds for which /health reuses the replicas' state, because callers need no key and have no
rate limit."""


@dataclass(frozen=True)
class Limits:
    requests_per_minute: int
    """Maximum requests per minute, per key and gateway replica."""
    max_tokens: int
    """Maximum tokens per answer."""
    log_prompts: bool
    """Whether the log line of a request contains its prompt."""


class Gateway:
    """Serves HTTP. `models` and `judge` are handles of the other deployments; `folders` holds each
    model's folder."""

    def __init__(
        self,
        models: "dict[str, DeploymentHandle]",
        judge: "DeploymentHandle | None",
        votes: Path,
        folders: dict[str, Path],
        limits: Limits,
        keys_needed: bool,
    ):
        keys = read_keys()
        if keys_needed and not keys:
            raise Permanent(f"{KEYS_VARIABLE} is not set on the gateway's node; set it there")
        from ray import serve

        chat_formats = {
            name: load_chat_format(folder, ChatFormat.to_ask) for name, folder in folders.items()
        }
        self._dispatcher = Dispatcher(models, chat_formats, limits.max_tokens)
        self._judge, self._limits, self._votes = judge, limits, VoteFile(votes)
        self._keys = Keys(keys, limits.requests_per_minute)
        self._started = int(time.time())
        self._application = serve.get_replica_context().app_name
        self._checked, self._down = -STATUS_SECONDS, list[str]()
        log.setLevel(logging.INFO)
        # Serve writes standard output into the replica's log.
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.propagate = False

    def __serve_build_asgi_app__(self) -> FastAPI:
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/", self._page),
            ("GET", "/health", self._health),
            ("GET", "/v1/models", self._list_models),
            ("GET", "/v1/models/{name}", self._get_model),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("POST", "/v1/votes", self._vote),
            ("DELETE", "/v1/votes/{id}", self._withdraw_vote),
            *(
                ("POST", f"/judge/{name}", self._judge_handler(form))
                for name, form in FORMS.items()
            ),
        ]
        return build_app(routes, self._keys)

    async def _page(self, request: Request) -> Response:
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

    async def _health(self, request: Request) -> Response:
        """Raises RequestError 503 unless every deployment has a running replica."""
        if time.monotonic() - self._checked > STATUS_SECONDS:
            self._checked, self._down = time.monotonic(), await asyncio.to_thread(self._find_down)
        if self._down:
            message = f"no replica of {', '.join(self._down)} is running; try again"
            raise RequestError(503, message, "not_ready", retry_after=STATUS_SECONDS)
        return JSONResponse({"status": "ok", "models": self._dispatcher.names})

    def _find_down(self) -> list[str]:
        from ray import serve

        deployments = serve.status().applications[self._application].deployments
        return [n for n, status in deployments.items() if not status.replica_states.get("RUNNING")]

    async def _list_models(self, request: Request) -> Response:
        cards = [self._model_card(name) for name in self._dispatcher.names]
        return JSONResponse({"object": "list", "data": cards})

    async def _get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._dispatcher.handle(name)
        return JSONResponse(self._model_card(name))

    def _model_card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "zephyr_ray"}

    async def _chat(self, request: Request) -> Response:
        response = await self._dispatcher.chat(await read_body(request), request.state.id)
        return respond(request, response, self._limits.log_prompts)

    async def _complete(self, request: Request) -> Response:
        response = await self._dispatcher.complete(await read_body(request), request.state.id)
        return respond(request, response, self._limits.log_prompts)

    async def _vote(self, request: Request) -> Response:
        vote = parse(VoteRequest, await read_body(request))
        for answer in (vote.left, vote.right):
            self._dispatcher.handle(answer.model)
        if vote.messages[-1].role != "user":
            message = "messages: must end with a user message"
            raise RequestError(400, message, "invalid_value", "messages")
        return JSONResponse({"id": await _store(partial(self._votes.add, vote))})

    async def _withdraw_vote(self, request: Request) -> Response:
        vote_id = request.path_params["id"]
        try:
            await _store(partial(self._votes.withdraw, vote_id))
        except UnknownVote:
            message = f"no vote '{vote_id[:64]}'; use an id that POST /v1/votes returned"
            raise RequestError(404, message, "vote_not_found", "id") from None
        return JSONResponse({"id": vote_id, "withdrawn": True})

    def _judge_handler(self, form: Form) -> Handler:
        """Returns the handler of one judge form."""
        body = judge_request(form.fields)

        async def handler(request: Request) -> Response:
            judged = parse(body, await read_body(request)).requests
            answers = [j.answers() for j in judged]
            return await self._judge_rows(form.name, [j.row() for j in judged], answers)

        return handler

    async def _judge_rows(
        self, form: str, rows: list[dict[str, Any]], answers: list[list[dict[str, Any]]]
    ) -> Response:
        """Returns the judgements in the order of the rows. Raises RequestError if one fails."""
        if self._judge is None:
            message = (
                "the run has no judge that this service can host; rerun its comparison with one"
            )
            raise RequestError(404, message, "no_judge")
        import ray
        from ray.serve.exceptions import RayServeException

        remote = self._judge.judge.remote
        calls = [
            remote(form, row, row_answers) for row, row_answers in zip(rows, answers, strict=True)
        ]
        try:
            return JSONResponse({"results": await asyncio.gather(*calls)})
        except ray.exceptions.RayTaskError as error:
            # Its text is a remote traceback; the client gets only the text of the cause.
            if isinstance(error.cause, RowError):
                raise RequestError(400, f"the judge: {error.cause}", "judge_refused") from None
            if isinstance(error.cause, NoForm):
                raise RequestError(404, f"the judge: {error.cause}", "no_form") from None
            if not isinstance(error.cause, Permanent | Temporary):
                raise
            message = f"the judge: {error.cause}"
            raise RequestError(503, message, "judge_busy", retry_after=5) from None
        except (ray.exceptions.RayError, RayServeException):
            raise RequestError(
                503, "the judge was lost; try again", "judge_lost", retry_after=5
            ) from None
        finally:
            # Frees the judge if the client left or a call failed; has no effect on finished calls.
            for call in calls:
                call.cancel()


async def _store(write: Callable[[], T]) -> T:
    """Stores a vote or its withdrawal, in a thread. Raises RequestError 507 if the disk is full."""
    try:
        return await asyncio.to_thread(write)
    except OSError as error:
        # The exception's text would reveal the path.
        why = error.strerror or error
        raise RequestError(507, f"cannot store the vote: {why}", "no_storage") from None


def respond(request: Request, response: ModelResponse, log_prompts: bool) -> Response:
    """Returns the HTTP response, and records model and prompt for the log line."""
    request.state.note["model"] = response.model
    if log_prompts:
        request.state.note["prompt"] = response.prompt
    if response.events is None:
        return JSONResponse(response.body)
    return StreamingResponse(response.events, media_type="text/event-stream")
