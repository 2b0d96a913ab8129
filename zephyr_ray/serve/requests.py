"""Request bodies, strictly typed and bounded, and errors in the shape of OpenAI's API."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    create_model,
    model_validator,
)

MAX_MESSAGES, MAX_CHARACTERS = 256, 200_000
MAX_CHOICES, MAX_STOPS, MAX_LOGPROBS = 8, 4, 20
MAX_JUDGED_ROWS = 64
SEED_BOUND = 2**63
ERROR_WORDING = {"extra_forbidden": "not supported here", "missing": "is missing"}
"""Replaces pydantic's messages, by its type of error."""

Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]


class RequestError(Exception):
    """An HTTP error response: a status and one line for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(int(self.retry_after) + 1)
        return headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Body(BaseModel):
    """Rejects unknown fields: ignoring `tools`, for example, would answer a different question."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        """Drops unknown fields without a value: clients send answers back with such fields."""
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if k in cls.model_fields or v not in (None, [], {})}


T = TypeVar("T", bound=Body)


class Part(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_MESSAGES)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Returns the message with one text, its role one of system, user and assistant."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False


class SampledRequest(Body):
    """Fields that chat and completions share."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-SEED_BOUND, lt=SEED_BOUND)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=1)
    user: str | None = None
    """Accepted and ignored, because OpenAI's clients may send it."""


class ChatRequest(SampledRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def plain_messages(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]


class CompletionRequest(SampledRequest):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None


class VotedAnswer(Body):
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    text: Text
    finish_reason: str | None = None


class VoteRequest(Body):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    left: VotedAnswer
    right: VotedAnswer
    vote: Literal["left", "right", "tie"]


class JudgedAnswer(Body):
    text: Text
    finish_reason: Literal["stop", "length"] = "stop"


class JudgedPrompt(Body):
    """A prompt row; the rules judge reads `instruction` and `constraint`."""

    prompt: Text
    instruction: Text | None = None
    constraint: dict[str, Any] | None = None

    def row(self) -> dict[str, Any]:
        instruction = self.prompt if self.instruction is None else self.instruction
        return {"prompt": self.prompt, "instruction": instruction, "constraint": self.constraint}


def judge_request(fields: tuple[str, ...]) -> Any:
    """Returns the body of a judge form's route; `fields` name the judged answers."""
    answers: dict[str, Any] = dict.fromkeys(fields, (JudgedAnswer, ...))
    judged = create_model("Judged", __base__=JudgedPrompt, **answers)
    bounds = Field(min_length=1, max_length=MAX_JUDGED_ROWS)
    return create_model("JudgeRequest", __base__=Body, requests=(list[judged], bounds))  # type: ignore[valid-type]


def parse(cls: type[T], content: bytes) -> T:
    """Returns the typed body.

    Raises RequestError naming the first error: 400 for invalid JSON, 422 for an invalid field.
    """
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(400, "the body is not UTF-8", "invalid_encoding") from None
    try:
        return cls.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            message = f"the body is not JSON: {first['msg']}"
            raise RequestError(400, message, "invalid_json") from None
        # For a union, pydantic also names the member that it tried.
        path = [str(p) for p in first["loc"] if not re.match(r"constrained-str$|list\[", str(p))]
        param = ".".join(path) or None
        message = ERROR_WORDING.get(first["type"], first["msg"])
        if path[-1:] == ["content"]:
            message = "must be text, or parts of type text"
        raise RequestError(422, f"{param or 'body'}: {message}", first["type"], param) from None
