"""Who may ask, and how often: API keys from the environment, and a bucket of requests a key."""

import hashlib
import hmac
import os
import re
import time

from zephyr_ray.errors import Permanent
from zephyr_ray.serve.requests import RequestError

VARIABLE = "ZEPHYR_API_KEYS"
SHORTEST = 8
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def read_keys() -> list[str]:
    """The keys of the environment variable, comma-separated; none where it is not set."""
    keys = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    if any(len(key) < SHORTEST or not key.isascii() for key in keys):
        raise Permanent(f"{VARIABLE}: a key is at least {SHORTEST} ASCII characters")
    return keys


def check_address(host: str, keys: list[str]) -> None:
    """Permanent where anybody who reaches this machine could ask without a key."""
    if host not in LOOPBACK and not keys:
        raise Permanent(
            f"serving on {host} needs keys: set {VARIABLE} to one or more of your own choice, "
            "comma-separated, or serve on 127.0.0.1"
        )


class Keys:
    """Checks the Authorization header of requests. Without keys everybody is 'anonymous'."""

    def __init__(self, keys: list[str], per_minute: int):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._per_minute = per_minute
        self._left: dict[str, tuple[float, float]] = {}

    def admit(self, authorization: str | None) -> str:
        """A name of the key for logs, which does not give it away. RequestError 401 or 429."""
        holder = self._holder(authorization)
        now = time.monotonic()
        left, since = self._left.get(holder, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
        self._left[holder] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            raise RequestError(
                429,
                f"this key may ask {self._per_minute} times a minute",
                "rate_limit_exceeded",
                retry_after=(1 - left) * 60 / self._per_minute,
            )
        return holder

    def check_host(self, host: str | None) -> None:
        """Without keys only this machine's own names are served: a page of another site that a
        browser here shows could otherwise ask under a name it points to this address."""
        name = re.sub(r":\d+$", "", host or "").strip("[]")
        if not self._digests and name not in LOOPBACK:
            raise RequestError(403, "without keys, ask 127.0.0.1 or localhost", "wrong_host")

    def _holder(self, authorization: str | None) -> str:
        if not self._digests:
            return "anonymous"
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        # All are compared, and digests of one length: the time says nothing about a key.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(
                401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        return given.hex()[:8]
