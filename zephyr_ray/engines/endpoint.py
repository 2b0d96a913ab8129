"""Defines what engines at an HTTP address share: settings, client, and errors with a policy."""

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
"""Maximum retries by the client, with exponential backoff or after the delay in Retry-After."""
TIMEOUT_SECONDS = 120
"""Maximum seconds per request."""


class EndpointSettings(ModelSettings):
    """Settings of an engine at an address."""

    base_url: str
    """The address. It is in the content key, because one name can mean different models."""
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
def typed_errors(client: "AsyncOpenAI", target: str) -> Iterator[None]:
    """Translates the client's errors into StopRun, Temporary, or Permanent for this row."""
    import openai

    address = client.base_url
    try:
        yield
    except (
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    ) as error:
        raise StopRun(f"{address} refuses {target}: {error}") from None
    except (openai.RateLimitError, openai.InternalServerError) as error:
        raise Temporary(f"{address}: {error}") from None
    except openai.APIConnectionError as error:
        raise Temporary(f"{address} does not answer: {error}") from None
    except openai.APIStatusError as error:
        raise Permanent(f"{address} refuses this prompt: {error}") from None
