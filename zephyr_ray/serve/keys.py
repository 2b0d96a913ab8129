"""Checks API keys from the environment, and limits the request rate per key."""

import hashlib
import hmac
import os
import re
import time

from zephyr_ray.errors import Permanent
from zephyr_ray.serve.request_error import RequestError

KEYS_VARIABLE = "ZEPHYR_API_KEYS"
MIN_KEY_LENGTH = 8
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def read_keys() -> list[str]:
    """Returns the comma-separated keys in the environment variable; none if it is not set.

    Raises Permanent if a key is too short or not ASCII.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if any(len(key) < MIN_KEY_LENGTH or not key.isascii() for key in keys):
        raise Permanent(
            f"{KEYS_VARIABLE}: a key is too short or not ASCII; "
            f"use at least {MIN_KEY_LENGTH} ASCII characters"
        )
    return keys


def require_keys(host: str, keys: list[str]) -> None:
    """Raises Permanent if other machines could send requests without a key."""
    if host not in LOOPBACK and not keys:
        raise Permanent(
            f"serving on {host} needs keys; set {KEYS_VARIABLE} to keys of your choice, "
            "comma-separated, or serve on 127.0.0.1"
        )


class Keys:
    """Checks the key of each request and its rate. Without keys every client is 'anonymous'."""

    def __init__(self, keys: list[str], per_minute: int):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._per_minute = per_minute
        # Per key: requests left in its bucket, and when that was counted.
        self._buckets: dict[str, tuple[float, float]] = {}

    def admit(self, authorization: str | None) -> str:
        """Takes one request from the key's bucket and returns the key's name for the log, a hash.

        Raises RequestError 401 for an unknown key, 429 for an empty bucket.
        """
        name = self._identify(authorization)
        now = time.monotonic()
        left, since = self._buckets.get(name, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
        self._buckets[name] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            message = f"this key is limited to {self._per_minute} requests per minute; slow down"
            wait = (1 - left) * 60 / self._per_minute
            raise RequestError(429, message, "rate_limit_exceeded", retry_after=wait)
        return name

    def check_host(self, host: str | None) -> None:
        """Raises RequestError 403 if, without keys, the Host header is not a loopback name.

        Another site's page in a browser on this machine can make its own name resolve to the
        loopback address (DNS rebinding); without keys nothing else would stop its requests.
        """
        name = re.sub(r":\d+$", "", host or "").strip("[]")
        if not self._digests and name not in LOOPBACK:
            message = "without keys, use the address 127.0.0.1 or localhost"
            raise RequestError(403, message, "wrong_host")

    def _identify(self, authorization: str | None) -> str:
        if not self._digests:
            return "anonymous"
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        # Compares with every digest, all of equal length, so that the time reveals nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            message = "a valid key is required: Authorization: Bearer KEY"
            raise RequestError(401, message, "invalid_api_key")
        return given.hex()[:8]
