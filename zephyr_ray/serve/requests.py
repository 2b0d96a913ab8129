"""Request bodies, strictly typed and bounded, and errors in the shape of OpenAI's API."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from zephyr_ray.errors import Permanent
from zephyr_ray.models import constraints
from zephyr_ray.serve.request_error import RequestError

MAX_MESSAGES, MAX_CHARACTERS = 256, 200_000
MAX_CHOICES, MAX_LOGPROBS = 8, 20
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 500
MAX_PROMPTS, MAX_PROMPT_TOKENS = 8, 200_000
MAX_JUDGED_ROWS, MAX_JUDGED_TOGETHER = 64, 32
SEED_BOUND, TOKEN_ID_BOUND = 2**63, 2**31
ERROR_WORDING = {
    "extra_forbidden": "not supported here; remove it",
    "missing": "is missing",
    "model_type": "must be an object",
}
"""Messages that replace pydantic's, by error type."""


@dataclass(frozen=True)
class Wording:
    """Replaces the error messages of a union: pydantic's name one member and omit the limits."""

    message: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), "invalid_value", custom_error_message=self.message
        )


class Body(BaseModel):
    """Rejects unknown fields: ignoring `tools`, for example, would answer a different question."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Values that change nothing here, such as OpenAI's defaults, by the unknown field's name."""

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, value: Any) -> Any:
        """Drops unknown fields whose values change nothing, because clients send many of them."""
        if not isinstance(value, dict):
            return value
        return {
            name: content
            for name, content in value.items()
            if name in cls.model_fields
            or content not in (None, [], *cls.without_effect.get(name, ()))
        }


T = TypeVar("T", bound=Body)
Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=TOKEN_ID_BOUND)]],
    Field(min_length=1, max_length=MAX_PROMPT_TOKENS),
]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Part(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[Part], Field(max_length=MAX_MESSAGES)] | None,
        Wording(
            f"must be text, or parts of type text (at most {MAX_MESSAGES}), "
            f"with at most {MAX_CHARACTERS} characters each"
        ),
    ] = None
    name: str | None = None

    @model_validator(mode="after")
    def _require_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            why = "content is missing; only an assistant's may be null"
            raise PydanticCustomError("missing_content", why)
        return self

    def plain(self) -> dict[str, str]:
        """Returns the message with its parts joined, and with role system for developer."""
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    without_effect = {"include_obfuscation": (True, False)}

    include_usage: bool | None = None


IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata")
"""Fields that are accepted but not used: labels for OpenAI's own records."""


class SampledRequest(Body):
    """Fields that chat and completions share."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None,
        Wording(
            f"must be a string, or a list of at most {MAX_STOPS} strings, "
            f"each of 1 to {MAX_STOP_CHARACTERS} characters"
        ),
    ] = None
    seed: int | None = Field(None, ge=-SEED_BOUND, lt=SEED_BOUND)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=1)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None


class ChatRequest(SampledRequest):
    without_effect = {
        "function_call": ("none", "auto"),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "reasoning_effort": ("none", "medium"),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "verbosity": ("medium",),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def plain_messages(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]


class CompletionRequest(SampledRequest):
    without_effect = {"best_of": (1,), "logit_bias": ({},)}

    prompt: Annotated[
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
        Wording(
            f"must be a string, a list of token IDs, or a list of 1 to {MAX_PROMPTS} of either, "
            f"with at most {MAX_CHARACTERS} characters per string and {MAX_PROMPT_TOKENS} IDs per "
            "list"
        ),
    ]
    # With `echo`, 0 returns the prompt alone, with its log-probabilities.
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None


def end_of(finish_reason: str | None) -> str:
    """Returns "stop" if the model ended the answer, otherwise "length", even if the user stopped
    it."""
    return "stop" if finish_reason == "stop" else "length"


class VotedAnswer(Body):
    model: ModelName
    text: Text
    finish_reason: str | None = "stop"
    """If missing, the answer counts as complete, as earlier answers do; null means that the user
    stopped it."""


class VotedMessage(ChatMessage):
    """A message before the voted answers; `finish_reason` says how an assistant's message ended."""

    finish_reason: str | None = None

    def plain(self) -> dict[str, str]:
        message = super().plain()
        if self.role == "assistant" and "finish_reason" in self.model_fields_set:
            message["finish_reason"] = end_of(self.finish_reason)
        return message


class VoteRequest(Body):
    messages: Annotated[list[VotedMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    left: VotedAnswer
    right: VotedAnswer
    vote: Literal["left", "right", "tie"]
    blind: bool | None = None
    """Whether the voter did not know which model gave which answer; if missing, the voter may have
    known."""


class JudgedAnswer(Body):
    text: Text
    finish_reason: Literal["stop", "length"] = "stop"


class JudgedPrompt(Body):
    """A prompt row; the rules judge reads `instruction` and `constraint`."""

    prompt: Text
    instruction: Text | None = None
    constraint: dict[str, Any] | None = None
    order_seed: Text | None = None
    """Seeds the order of answers that are judged together; by default, the prompt does."""
    reference: Text | None = None
    """A correct answer to show to the judge."""

    @field_validator("constraint")
    @classmethod
    def _check_constraint(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            if value:
                constraints.validate(value)
        except Permanent as error:
            raise PydanticCustomError("invalid_value", "{why}", {"why": str(error)}) from None
        return value

    def row(self) -> dict[str, Any]:
        instruction = self.prompt if self.instruction is None else self.instruction
        row = {"prompt": self.prompt, "instruction": instruction, "constraint": self.constraint}
        return row | self.model_dump(include={"order_seed", "reference"}, exclude_none=True)

    def answers(self) -> list[dict[str, Any]]:
        """Returns the judged answers: those in `completions`, or one per field of the form."""
        given = [getattr(self, name) for name in type(self).model_fields]
        answers = [a for a in given if isinstance(a, JudgedAnswer)]
        return [a.model_dump() for a in getattr(self, "completions", answers)]


def judge_request(fields: tuple[str, ...] | None) -> Any:
    """Returns the body type of a judge form's route; `fields` name the judged answers, None for a
    list of them in `completions`."""
    answers: dict[str, Any] = dict.fromkeys(fields or (), (JudgedAnswer, ...))
    if fields is None:
        together = Field(min_length=1, max_length=MAX_JUDGED_TOGETHER)
        answers["completions"] = (list[JudgedAnswer], together)
    judged = create_model("Judged", __base__=JudgedPrompt, **answers)
    bounds = Field(min_length=1, max_length=MAX_JUDGED_ROWS)
    return create_model("JudgeRequest", __base__=Body, requests=(list[judged], bounds))  # type: ignore[valid-type]


def parse(cls: type[T], content: bytes) -> T:
    """Returns the typed body. Raises RequestError 400, which names the first error."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(
            400, "the body is not UTF-8; encode it as UTF-8", "invalid_encoding"
        ) from None
    try:
        return cls.model_validate_json(content)
    except ValidationError as error:
        raise first_error(error) from None


def first_error(error: ValidationError) -> RequestError:
    """Converts the first of the errors to the response for the client."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {first['msg']}", "invalid_json")
    param = ".".join(str(part) for part in first["loc"]) or None
    message = ERROR_WORDING.get(first["type"], first["msg"])
    return RequestError(400, f"{param or 'body'}: {message}", first["type"], param)
