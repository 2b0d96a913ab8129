"""Calls the Batch API of an endpoint: upload a file, create a batch, wait for it, download files.

A call without a reply is repeated, but nothing may be paid for twice, so `create` first looks for
the batch that an earlier call may have created.
"""

import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zephyr_ray.engines.endpoint import WAIT_SECONDS, Endpoint, stops_within
from zephyr_ray.engines.replies import Unavailable, read_object
from zephyr_ray.errors import Temporary

if TYPE_CHECKING:
    from zephyr_ray.engines.http_client import HttpReply

ROUTE = "/v1/chat/completions"
"""The route of the requests; a batch states it with this prefix, whatever the base URL."""
OVER = ("completed", "failed", "expired", "cancelled")
"""Final statuses of a batch."""
POLL_SECONDS = 30
"""Seconds between two checks whether a batch is over."""
RETRY_SECONDS = 5
"""Seconds before a call without a reply is repeated, unless the endpoint states a delay."""
PAGE, PAGES = 100, 10
"""Batches per page of the list, and pages to search."""

Json = dict[str, Any]
T = TypeVar("T")


class BatchApi:
    """A client of the Batch API."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint, self._name = endpoint, endpoint.name

    async def upload(self, bodies: list[Json]) -> str:
        """Uploads requests, with their numbers from 0 as ids; returns the id of the file."""
        lines = (
            {"custom_id": str(number), "method": "POST", "url": ROUTE, "body": body}
            for number, body in enumerate(bodies)
        )
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()

        async def call() -> str:
            from aiohttp import FormData

            form = FormData({"purpose": "batch"})  # a form can be sent only once
            form.add_field("file", content, filename="requests.jsonl")
            return await self._post("/files", data=form)

        return await self._patiently(call)

    async def create(self, file: str) -> str:
        """Creates the batch of a file; returns its id."""
        in_doubt = False

        async def call() -> str:
            nonlocal in_doubt
            if in_doubt and (batch := await self.find(file)):
                return batch
            in_doubt = True
            body = {"input_file_id": file, "endpoint": ROUTE, "completion_window": "24h"}
            return await self._post("/batches", json=body)

        return await self._patiently(call)

    async def find(self, file: str) -> str | None:
        """Returns the id of the batch of a file; None if the list has none."""
        params: Json = {"limit": PAGE}
        for _ in range(PAGES):
            page = await self._patiently(partial(self._get, "/batches", params=params))
            batches = page.get("data") or []
            for batch in batches:
                if batch.get("input_file_id") == file:
                    return str(batch["id"])
            if not page.get("has_more") or not batches:
                break
            params = {"limit": PAGE, "after": batches[-1]["id"]}
        return None

    async def has_file(self, file: str) -> bool:
        """Returns whether a file still exists; it may have expired or been deleted."""
        return await self._patiently(partial(self._existing, f"/files/{file}")) is not None

    async def wait(self, batch: str) -> Json | None:
        """Returns the state of a batch once it is over; None if the endpoint does not know it.
        Raises Temporary if the stage stops first."""
        while True:
            state = await self._patiently(partial(self._existing, f"/batches/{batch}"))
            if state is None or state.get("status") in OVER:
                return state
            if await stops_within(POLL_SECONDS):
                raise Temporary(f"{self._name}: batch {batch} is not over; run again to collect it")

    async def download(self, file: str) -> list[Json] | None:
        """Returns the objects in the lines of a result file; None if it does not exist."""

        async def call() -> list[Json] | None:
            reply = await self._endpoint.call("GET", f"/files/{file}/content")
            if reply.status == 404:
                return None
            if reply.status != 200:
                self._object(reply)
            try:
                # Not `splitlines`: JSON may contain line breaks such as U+2028.
                lines = [json.loads(text) for text in reply.text.split("\n") if text.strip()]
                return [line for line in lines if isinstance(line, dict)]
            except ValueError:
                raise Unavailable(f"{self._name}: file {file} is not JSON lines") from None

        return await self._patiently(call)

    async def _post(self, path: str, **request: Any) -> str:
        """Returns the id of the object that the request created."""
        made = self._object(await self._endpoint.call("POST", path, **request))
        if not isinstance(made.get("id"), str):
            raise Unavailable(f"{self._name}: the reply to POST {path} has no id")
        return made["id"]

    async def _existing(self, path: str) -> Json | None:
        """Returns the object at a path; None if it does not exist."""
        reply = await self._endpoint.call("GET", path)
        return None if reply.status == 404 else self._object(reply)

    async def _get(self, path: str, **request: Any) -> Json:
        return self._object(await self._endpoint.call("GET", path, **request))

    def _object(self, reply: "HttpReply") -> Json:
        return read_object(reply.status, reply.headers, reply.text, self._name)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call until it is answered. Raises Unavailable if that takes too long, or if the
        stage stops."""
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                return await call()
            except Unavailable as error:
                delay = RETRY_SECONDS if error.after is None else error.after
                if time.monotonic() > until or await stops_within(delay):
                    raise
