"""What engines behind an HTTP address share: address, key, client, and errors with a policy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import field_validator

from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.models.contract import StopRun
from zephyr_ray.settings import OPERATIONAL

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RETRIES = 6
"""Retries by the client, after exponential delays or as Retry-After says."""
TIMEOUT_SECONDS = 120


class EndpointSettings(ModelSettings):
    """Settings of an engine at an address."""

    base_url: str
    """The address. It is part of the content key: the same name is another model elsewhere."""
    api_key_env: Annotated[str | None, OPERATIONAL] = None
    """The name of the environment variable that holds the key, never the key."""

    @field_validator("base_url")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value

    def variables(self) -> list[str]:
        return [self.api_key_env] if self.api_key_env else []

    def preflight(self) -> None:
        self.api_key()

    def api_key(self) -> str:
        """Returns the key. Raises StopRun if the environment variable is not set."""
        if self.api_key_env is None:
            return "none"  # local servers want no key, the client wants one
        key = os.environ.get(self.api_key_env)
        if not key:
            raise StopRun(f"environment variable {self.api_key_env} (api_key_env) is not set")
        return key

    def client(self) -> "AsyncOpenAI":
        import openai

        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.api_key(),
            max_retries=RETRIES,
            timeout=TIMEOUT_SECONDS,
        )


@contextmanager
def typed_errors(client: "AsyncOpenAI", what: str) -> Iterator[None]:
    """Raises the client's errors as ours: StopRun, Temporary, or Permanent for this row."""
    import openai

    address = client.base_url
    try:
        yield
    except (
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    ) as error:
        raise StopRun(f"{address} refuses {what}: {error}") from None
    except (openai.RateLimitError, openai.InternalServerError) as error:
        raise Temporary(f"{address}: {error}") from None
    except openai.APIConnectionError as error:
        raise Temporary(f"{address} does not answer: {error}") from None
    except openai.APIStatusError as error:
        raise Permanent(f"{address} refuses this prompt: {error}") from None
