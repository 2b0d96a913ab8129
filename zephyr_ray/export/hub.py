"""Pushes an exported folder to a model hub, with the token in HF_TOKEN."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.formatting import shorten
from zephyr_ray.models.weights import HUB_ID

TOKEN = "HF_TOKEN"


def create_repository(name: str, what: str) -> None:
    """Creates a private repository for a "model" or "dataset", unless it exists.

    It is called before the export, so that a wrong name or token is found before the conversion.
    Raises Permanent if the hub refuses, Temporary if the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if not HUB_ID.fullmatch(name):
        raise Permanent(f"--push {name}: not the name of a repository; write owner/name")
    if not os.environ.get(TOKEN):
        raise Permanent(f"--push needs {TOKEN}, which is not set; set a token with write access")
    with _errors(name):
        api = HfApi(token=os.environ[TOKEN])
        api.create_repo(name, repo_type=what, private=True, exist_ok=True)


def push(folder: Path, name: str, what: str) -> str:
    """Uploads the folder to the repository and returns its address. Keeps files of the
    repository that are not in the folder. Raises Permanent if the hub refuses or fails, with the
    command that uploads the folder later."""
    from huggingface_hub import HfApi

    api = HfApi(token=os.environ[TOKEN])
    message = "Export from zephyr_ray"
    try:
        with _errors(name):
            api.upload_folder(
                repo_id=name, folder_path=folder, repo_type=what, commit_message=message
            )
    except (Permanent, Temporary) as error:
        upload = shlex.join(["hf", "upload", "--repo-type", what, name, str(folder)])
        raise Permanent(f"{error}; the folder is complete, so upload it with: {upload}") from None
    return f"{api.endpoint}/{'datasets/' if what == 'dataset' else ''}{name}"


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Raises the hub client's errors as Permanent or Temporary, in one line."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    failed = f"cannot push to {name}"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise Permanent(
                f"{failed}: the hub rejects the token in {TOKEN}; set a valid one"
            ) from None
        if status in (403, 404):
            raise Permanent(
                f"{failed}: the token in {TOKEN} may not write there; set one that may, or choose "
                "another owner"
            ) from None
        kind = Temporary if status >= 500 or status == 429 else Permanent
        raise kind(f"{failed}: {_reason(error)}") from None
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        raise Temporary(f"{failed}: {_reason(error)}") from None
    except ValueError as error:  # refused by the hub's storage, or by its check of the card
        raise Permanent(f"{failed}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 200)
