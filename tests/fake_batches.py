"""Fakes the files and batches of an OpenAI-compatible API."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

Body = dict[str, Any]
Answer = Callable[[Body], tuple[int, Body]]
"""Returns the status and the JSON of the reply to one request."""


class Batches:
    """The files and batches of one provider."""

    def __init__(self, answer: Answer, seconds: float, ends: tuple[str, ...], queue: int):
        """Each batch takes `seconds`. `ends` lists the outcomes of the first batches: "completed",
        "expired" or "cancelled" after half of the requests, or an error code; later ones complete.
        A batch also fails if more than `queue` requests would be in progress."""
        self._answer, self._seconds, self._ends, self._queue = answer, seconds, ends, queue
        self.files: dict[str, str] = {}
        self.refusal = 400
        """HTTP status of the refusal to create a batch whose file does not exist."""
        self.held = False
        """Whether no batch ends."""
        self.all: dict[str, Body] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/files", self._upload),
            web.get("/v1/files/{id}", self._show_file),
            web.get("/v1/files/{id}/content", self._download),
            web.post("/v1/batches", self._create),
            web.get("/v1/batches", self._list),
            web.get("/v1/batches/{id}", self._show),
        ]

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file = form["file"]
        assert form["purpose"] == "batch" and isinstance(file, web.FileField)
        return web.json_response({"id": self._store(file.file.read().decode()), "object": "file"})

    def _store(self, text: str) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = text
        return name

    async def _show_file(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name not in self.files:
            return _no_file(name, 404)
        return web.json_response({"id": name, "object": "file"})

    async def _download(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name not in self.files:
            return _no_file(name, 404)
        return web.Response(text=self.files[name], content_type="application/octet-stream")

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["input_file_id"] not in self.files:
            return _no_file(body["input_file_id"], self.refusal)
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines), "custom_id used twice"
        running = [b for b in self.all.values() if b["status"] == "in_progress"]
        queued = sum(batch["request_counts"]["total"] for batch in running)
        number = len(self.all)
        end = self._ends[number] if number < len(self._ends) else "completed"
        if queued + len(lines) > self._queue:
            end = "token_limit_exceeded"
        batch = {
            **body,
            "id": f"batch_{number}",
            "object": "batch",
            "status": "in_progress",
            "created_at": int(time.time()),
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
        }
        self.all[batch["id"]] = batch
        task = asyncio.create_task(self._run(batch, lines, end))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return web.json_response(batch)

    async def _run(self, batch: Body, lines: list[Body], end: str) -> None:
        await asyncio.sleep(self._seconds)
        while self.held:
            await asyncio.sleep(0.01)
        if end not in ("completed", "expired", "cancelled"):
            data = [{"code": end, "message": f"The batch failed: {end}.", "line": None}]
            batch |= {"status": "failed", "errors": {"object": "list", "data": data}}
            return
        answered = lines if end == "completed" else lines[: len(lines) // 2]
        results: dict[bool, list[Body]] = {True: [], False: []}
        for line in answered:
            status, reply = self._answer(line["body"])
            response = {"status_code": status, "request_id": "req", "body": reply}
            results[status == 200].append(_result(line, response, None))
        for line in lines[len(answered) :]:
            why = {"code": f"batch_{end}", "message": f"The batch was {end} before this request."}
            results[False].append(_result(line, None, why))
        for good, name in ((True, "output_file_id"), (False, "error_file_id")):
            random.Random(batch["id"]).shuffle(results[good])
            if results[good]:
                batch[name] = self._store("".join(json.dumps(r) + "\n" for r in results[good]))
        counts = {"completed": len(results[True]), "failed": len(results[False])}
        batch |= {"status": end, "request_counts": {"total": len(lines), **counts}}

    async def _list(self, request: web.Request) -> web.Response:
        newest = list(reversed(self.all.values()))
        first, size = request.query.get("after"), int(request.query.get("limit", 20))
        start = 1 + [batch["id"] for batch in newest].index(first) if first else 0
        page = newest[start : start + size]
        has_more = start + size < len(newest)
        return web.json_response({"object": "list", "data": page, "has_more": has_more})

    async def _show(self, request: web.Request) -> web.Response:
        batch = self.all.get(request.match_info["id"])
        return web.json_response(batch or {}, status=200 if batch else 404)


def _no_file(name: str, status: int) -> web.Response:
    why = {"message": f"No such File object: {name}", "type": "invalid_request_error"}
    return web.json_response({"error": {**why, "param": "id", "code": None}}, status=status)


def _result(line: Body, response: Body | None, error: Body | None) -> Body:
    name = f"batch_req_{line['custom_id']}"
    return {"id": name, "custom_id": line["custom_id"], "response": response, "error": error}
