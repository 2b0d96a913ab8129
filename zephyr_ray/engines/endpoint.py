"""Defines settings, client and error handling for engines that call an HTTP endpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import field_validator

from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.masking import remember
from zephyr_ray.models.contract import StopRun
from zephyr_ray.settings import OPERATIONAL

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RETRIES = 6
"""Maximum retries per request, with exponential backoff or after the delay in Retry-After."""
TIMEOUT_SECONDS = 120
"""Maximum seconds per attempt."""


class EndpointSettings(ModelSettings):
    """Settings of an engine that calls an HTTP endpoint."""

    base_url: str
    """Endpoint URL; part of the content key, because the same name elsewhere may be another
    model."""
    api_key_env: Annotated[str | None, OPERATIONAL] = None
    """Name of the environment variable that holds the key, never the key itself."""

    @field_validator("base_url")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value

    def environment_variables(self) -> list[str]:
        return [self.api_key_env] if self.api_key_env else []

    def preflight(self) -> None:
        self.api_key()

    def api_key(self) -> str:
        """Returns the key. Raises StopRun if the environment variable is not set."""
        if self.api_key_env is None:
            return "none"  # the client requires a key even if the server needs none
        key = os.environ.get(self.api_key_env)
        if not key:
            raise StopRun(
                f"environment variable {self.api_key_env} (api_key_env) is not set; export it"
            )
        return remember(key)

    def client(self) -> "AsyncOpenAI":
        import openai

        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.api_key(),
            max_retries=RETRIES,
            timeout=TIMEOUT_SECONDS,
        )


@contextmanager
def typed_errors(client: "AsyncOpenAI", target: str) -> Iterator[None]:
    """Raises the client's errors as StopRun (every row would fail), Temporary (retry) or Permanent
    (this row fails)."""
    import openai

    address = client.base_url
    try:
        yield
    except (
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    ) as error:
        raise StopRun(
            f"{address}: cannot use {target}: {error}; check api_key_env and the model's name"
        ) from None
    except (openai.RateLimitError, openai.InternalServerError) as error:
        raise Temporary(f"{address}: {error}") from None
    except openai.APIConnectionError as error:
        raise Temporary(f"cannot reach {address}: {error}") from None
    except openai.APIStatusError as error:
        raise Permanent(f"{address} rejected this prompt: {error}") from None
