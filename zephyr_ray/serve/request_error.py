"""Defines an error response in the shape of OpenAI's API."""

from typing import Any

MAX_ERROR_CHARACTERS = 500


class RequestError(Exception):
    """An HTTP error response: a status and one line for the client, which may quote the request."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(_bounded(message))
        self.status, self.code, self.retry_after = status, code, retry_after
        self.param = param and _bounded(param)

    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(int(self.retry_after) + 1)
        return headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def _bounded(text: str) -> str:
    """Returns a text, which may quote the request, on one line of bounded length."""
    return " ".join(text.split())[:MAX_ERROR_CHARACTERS]
