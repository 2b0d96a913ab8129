"""Defines settings of engines that call an HTTP endpoint, and the client that they share."""

import asyncio
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import field_validator

from zephyr_ray.engines.connection import check_reachable, describe, find_proxy, sync_client
from zephyr_ray.engines.meter import Attempt
from zephyr_ray.engines.replies import NotSent, Unavailable, read_object
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.masking import remember
from zephyr_ray.models.contract import STOPPING, StopRun, begin_waiting_requests
from zephyr_ray.settings import OPERATIONAL

if TYPE_CHECKING:
    from zephyr_ray.engines.http_client import HttpClient, HttpReply

log = logging.getLogger("zephyr_ray")

RETRIES = 6
"""Maximum retries per request, with exponential backoff or after the delay in Retry-After. A rate
limit is waited out instead, see WAIT_SECONDS."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 8.0
"""Seconds of backoff before the first retry, and maximum seconds of backoff."""
WAIT_SECONDS = 600
"""Maximum seconds that a request waits while the endpoint answers no request at all."""
LONGEST_WORD = 15
"""Maximum characters of a word in api_key_env; a longer one in capitals may be the key itself."""
NOTICE_SECONDS = 60
"""Minimum seconds between two lines about retries."""
PREFLIGHT_SECONDS = 5
"""Maximum seconds without a byte when a connection is checked before a run."""

T = TypeVar("T")


class EndpointSettings(ModelSettings):
    """Settings of an engine that calls an HTTP endpoint."""

    has_slots = True

    base_url: str
    """Endpoint URL; part of the content key, because the same model name at another URL may be
    another model."""
    api_key_env: Annotated[str | None, OPERATIONAL] = None
    """Name of the environment variable that holds the key, in capitals; never the key itself."""

    @field_validator("base_url")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _is_a_name(cls, value: Any) -> Any:
        is_name = isinstance(value, str) and re.fullmatch("[A-Z_][A-Z0-9_]*", value)
        if value is None or (is_name and max(map(len, value.split("_"))) <= LONGEST_WORD):
            return value
        raise ValueError(
            "not the name of an environment variable in capitals, and may be the key itself; "
            "export the key in a variable and write its name, such as OPENAI_API_KEY"
        )

    def environment_variables(self) -> list[str]:
        return [self.api_key_env] if self.api_key_env else []

    def preflight(self) -> None:
        import httpx2

        options = {"timeout": PREFLIGHT_SECONDS, "max_retries": 0}
        key = self.api_key()
        try:
            with sync_client(self.base_url, key, **options) as client:
                check_reachable(client, self.api_key_env)
        except (httpx2.InvalidURL, UnicodeError):  # UnicodeError if a part of the host is empty
            raise Permanent("base_url is not a URL; correct it") from None

    def api_key(self) -> str:
        """Returns the key. Raises StopRun if the environment variable holds no valid one."""
        if self.api_key_env is None:
            return "none"  # the client requires a key even if the server needs none
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise StopRun(
                f"environment variable {self.api_key_env} (api_key_env) is not set; export it"
            )
        if not re.fullmatch("[!-~]+", key):
            raise StopRun(
                f"environment variable {self.api_key_env} (api_key_env) holds a line break, space "
                "or other character that no key has; export the key alone"
            )
        return remember(key)

    def client(self) -> "HttpClient":
        """Returns an HTTP client that sends the headers of OpenAI's client, but needs less time per
        request; OpenAI's would need more than everything else that a row does."""
        from zephyr_ray.engines.http_client import HttpClient

        with sync_client(self.base_url, self.api_key()) as openai:
            headers = {
                name: value
                for name, value in (openai.default_headers | openai.auth_headers).items()
                # The others describe OpenAI's client, or the body.
                if isinstance(value, str) and not name.startswith(("X-Stainless", "Content-Type"))
            }
        proxy = find_proxy(self.base_url)
        return HttpClient(self.base_url, headers, proxy.url if proxy else None)


class Endpoint:
    """Posts requests to an endpoint; retries and waits if that can help."""

    def __init__(self, settings: EndpointSettings, target: str):
        self._client = settings.client()
        self.name = f"{target} at {settings.base_url}"
        """Name of the endpoint in error lines."""
        self._last_answer = time.monotonic()
        self._last_notice = -math.inf

    async def post(
        self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any], str], T]
    ) -> T:
        """Returns what `read(object, name)` makes of the JSON object in the reply. Raises
        the errors of `replies.read_object` and `Attempt`."""
        start, retries = 0.0, 0
        while True:
            try:
                async with Attempt(body) as attempt:
                    start = start or time.monotonic()
                    # The answer is kept at once; only then does its row wait for others.
                    answer = read(await self._send(path, body, attempt), self.name)
                    await begin_waiting_requests()
                self._last_answer = time.monotonic()
                return answer
            except Unavailable as error:
                delay = error.after or min(FIRST_DELAY * 2**retries, LONGEST_DELAY)
                delay *= 1 + random.random() / 4  # so that rows do not all retry at once
                waited = time.monotonic() - max(start, self._last_answer)
                gives_up = retries >= RETRIES and not error.rate_limited
                if gives_up or waited + delay > WAIT_SECONDS:
                    raise
                if time.monotonic() > self._last_notice + NOTICE_SECONDS:
                    log.warning("%s; retrying", error)
                    self._last_notice = time.monotonic()
                if await stops_within(delay):
                    raise
            retries += 1

    async def _send(self, path: str, body: dict[str, Any], attempt: Attempt) -> dict[str, Any]:
        reply = await self.call("POST", path, json=body)
        attempt.replied(reply.status, reply.text)
        return read_object(reply.status, reply.headers, reply.text, self.name)

    async def call(self, method: str, path: str, **request: Any) -> "HttpReply":
        """Returns the reply to one request, whatever its status. Raises Unavailable if there is
        none."""
        from zephyr_ray.engines.http_client import NO_REPLY, NOT_SENT

        try:
            async with asyncio.timeout(WAIT_SECONDS) as deadline:
                return await self._client.send(method, path, **request)
        except NOT_SENT as error:
            raise NotSent(self._no_reply(error)) from None
        except NO_REPLY as error:
            if deadline.expired():
                raise Unavailable(f"{self.name}: no complete reply in {WAIT_SECONDS} s") from None
            raise Unavailable(self._no_reply(error)) from None

    def _no_reply(self, error: Exception) -> str:
        return f"{self.name}: no reply ({describe(error)})"


async def stops_within(seconds: float) -> bool:
    """Waits; returns whether the stage stopped meanwhile."""
    stopping = STOPPING.get() or asyncio.Event()
    with suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), seconds)
        return True
    return False
