"""Classifies a reply of an endpoint: an answer, an error of this row, or an error of the endpoint.

The rules read the HTTP status and the JSON: error object, choices, finish reason. A reply that no
rule matches is never an answer, and never an error of the row.
"""

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from zephyr_ray.engines.content import read_text
from zephyr_ray.engines.logprobs import LOGPROBS, read_first_tokens
from zephyr_ray.errors import RowError, Temporary
from zephyr_ray.formatting import duration, shorten
from zephyr_ray.models.contract import Reply, StopRun

ENDS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
}
"""`Reply.finish_reason` by the finish reason of a choice that has an answer."""
FILTERED = {
    *("content_filter", "content_filtered", "guardrail_intervened", "safety", "blocklist", "spii"),
    *("recitation", "prohibited_content", "refusal", "sensitive"),
}
"""Finish reasons of a choice that was withheld for its content."""
FIXES = {
    401: "set api_key_env to the variable that holds a valid key",
    402: "add credits, then run again",
    403: "use a key that has access",
    404: "correct model or base_url",
    407: "correct the user and password of the proxy",
}
"""Fix in the error line, by HTTP status; every row would get the same status."""
ROW_STATUSES = (400, 403, 413, 422, 451)
"""Statuses that one row may have caused; the error object decides."""
RETRIED_STATUSES = (408, 409, 425, 429)
"""Statuses below 500 for which a retry can help."""

MATCHED_CHARACTERS = 4000
"""Maximum characters of an error's text that the rules read."""

_BILLING = re.compile(
    r"insufficient_(quota|credit|balance|fund)|exceeded_current_quota|billing|payment|no_credit"
)
_NO_CREDIT = re.compile(r"credit balance is too low", re.IGNORECASE)
_KEY = re.compile(r"\bAPI key( is)? (not valid|invalid)|\binvalid API key", re.IGNORECASE)
_MODEL = re.compile(
    r"model_not|(invalid|unknown)[ _]model|not a valid model"
    r"|\bmodel\b[^.]{0,60}\b(not (found|exist)|does not exist)",
    re.IGNORECASE,
)
_LONG_CODE = re.compile(r"context_(length|size|window)|too_(long|large)|above_max_length")
_LONG = re.compile(
    r"context (length|window|size|limit)|(prompt|input|sequence) (length|size)"
    r"|token count[^.]{0,40}exceeds|(prompt|input|request|messages?)\b[^.]{0,40}\btoo (long|large)"
    r"|reduce the length of|too many (input |prompt )?tokens|inputs`? tokens"
    r"|must have less than \d+ tokens|has \d+ tokens, but the max"
    r"|longer than the max\w* model length",
    re.IGNORECASE,
)
_CONTENT_CODE = re.compile(r"content_?(filter|policy|moderation)|moderation|inspection|safety")
_CONTENT = re.compile(
    r"content[ -](management|filter\w*|moderation|exists risk)|result of our safety system"
    r"|(prompt|input|content|messages?|requests?)\b[^.]{0,60}\b"
    r"(flagged|inappropriate|violat\w+[^.]{0,40}(polic|guideline|terms|usage|safety))",
    re.IGNORECASE,
)
_BUSY_CODE = re.compile(r"rate_?limit|throttl|too_many_requests|overload|time_?out|timed_out")
_BUSY = re.compile(
    r"\btry(ing)? again\b|\bwait\b|unavailable|not available|timed out|out of memory|per min"
    r"|\borganization\b(?!['’]s)",
    re.IGNORECASE,
)
_ADVICE = re.compile(
    r"\b(reduce|shorten|modify|revise|rephrase|edit)\b[^.]{0,60}\btry again", re.IGNORECASE
)
"""Matches advice to change the request, which is not about the endpoint's state."""
_RATE_LIMIT = re.compile(
    r"rate.?limit|throttl|too_many_requests|per min|wait before trying", re.IGNORECASE
)
_CODE_OF_STATUS = re.compile(r"[45]\d\d")


class Unavailable(Temporary):
    """A request without an answer; the same request may get one later."""

    def __init__(self, message: str, after: float | None = None, rate_limited: bool = False):
        super().__init__(message)
        self.after = after
        """Seconds to wait before a retry, if the endpoint states them."""
        self.rate_limited = rate_limited


class NotSent(Unavailable):
    """A request that did not reach the endpoint."""


class Rejected(Temporary):
    """An error reply that no rule matches; an immediate retry does not help."""

    def __init__(self, message: str, error: "ErrorObject"):
        super().__init__(message)
        self.error = error


@dataclass(frozen=True)
class ErrorObject:
    """The content of a JSON error, in any of the shapes that servers use."""

    message: str
    codes: str = ""
    """Code and type of the error, in lower case."""
    param: str = ""
    flagged: bool = False
    """Whether it states that a moderation filter flagged the prompt."""
    status: int | None = None
    """The HTTP status that the error object itself states."""

    @classmethod
    def of(cls, data: Any) -> "ErrorObject | None":
        """Returns the error in a JSON value; None if the value contains no object or text."""
        while isinstance(data, list) and data:
            data = data[0]
        if isinstance(data, str):
            return cls(shorten(data, MATCHED_CHARACTERS))
        if not isinstance(data, dict):
            return None
        for name in ("error", "errors", "detail"):
            if data.get(name) and (inner := cls.of(data[name])):
                return inner
        message = next((data[n] for n in ("message", "msg", "detail") if data.get(n)), data)
        inner_error, metadata = data.get("innererror"), data.get("metadata")
        codes = [data.get("code"), data.get("type")]
        codes += [inner_error.get("code")] if isinstance(inner_error, dict) else []
        location = data.get("loc")
        param = location[-1] if isinstance(location, list) and location else data.get("param")
        stated = str(data.get("code"))
        return cls(
            shorten(
                message if isinstance(message, str) else json.dumps(message), MATCHED_CHARACTERS
            ),
            " ".join(str(code).lower() for code in codes if code is not None),
            str(param or "").rpartition(".")[2],
            isinstance(metadata, dict) and "flagged_input" in metadata,
            int(stated) if _CODE_OF_STATUS.fullmatch(stated) else None,
        )

    def names(self, parameter: str) -> bool:
        """Returns whether the error is about this parameter of the request."""
        if self.param:
            return self.param == parameter
        return mentions(self.message, parameter)

    @property
    def is_about_logprobs(self) -> bool:
        return LOGPROBS.search(self.param or self.message) is not None


def mentions(text: str, parameter: str) -> bool:
    return re.search(rf"\b{re.escape(parameter)}\b", text) is not None


def read_object(status: int, headers: Mapping[str, str], text: str, where: str) -> dict[str, Any]:
    """Returns the JSON object of a successful reply; `where` begins every error line.

    Raises RowError if this row caused the error, StopRun if every row would fail, and Unavailable
    or Rejected otherwise.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if status < 300:
        if isinstance(data, dict) and not data.get("error") and data.get("object") != "error":
            return data
        if data is None:
            received = headers.get("content-type", "a body").partition(";")[0]
            raise Unavailable(f"{where}: answers {received} instead of JSON: {shorten(text)}")
    if 300 <= status < 400:
        # The query is omitted, because it may hold a token.
        to = headers.get("location", "another address").partition("?")[0]
        raise StopRun(f"{where}: redirects to {to}; set base_url to the API itself")
    if data is None and status in ROW_STATUSES and status != 413:
        # The error page of a gateway says nothing about the row, unlike an error of the API.
        raise Rejected(f"{where}: status {status}: {shorten(text)}", ErrorObject(""))
    fail(status, ErrorObject.of(data) or ErrorObject(shorten(text)), where, headers)


def fail(
    status: int, error: ErrorObject, where: str, headers: Mapping[str, str] | None = None
) -> NoReturn:
    """Raises the exception for an error object; see `read_object`. Ignores a status below 300."""
    if status < 300 and error.status:
        status = error.status
    prefix = f"status {status}: " if status >= 300 else ""
    line = f"{where}: {prefix}{shorten(error.message).rstrip('.')}"
    may_be_row = status < 300 or status in ROW_STATUSES
    cause = _row_cause(status, error) if may_be_row else None
    is_busy = may_be_row and (_BUSY_CODE.search(error.codes) or (cause and _is_busy(error)))
    if cause and not is_busy:
        raise RowError(line, cause)
    if _BILLING.search(error.codes) or (may_be_row and _NO_CREDIT.search(error.message)):
        raise StopRun(f"{line}; {FIXES[402]}")
    if may_be_row and _KEY.search(error.message):
        raise StopRun(f"{line}; {FIXES[401]}")
    if status < 500 and _MODEL.search(f"{error.codes} {error.message}"):
        raise StopRun(f"{line}; {FIXES[404]}")
    if may_be_row and error.is_about_logprobs:
        raise Rejected(line, error)  # OpenAI refuses them with status 403 too
    if status in FIXES and not is_busy:
        raise StopRun(f"{line}; {FIXES[status]}")
    if is_busy or status < 300 or status >= 500 or status in RETRIED_STATUSES:
        after = _retry_after(headers or {})
        line += f" (retry after {duration(after)})" if after else ""
        limited = is_busy and _RATE_LIMIT.search(f"{error.codes} {error.message}")
        raise Unavailable(line, after, rate_limited=status == 429 or bool(limited))
    raise Rejected(line, error)


def _row_cause(status: int, error: ErrorObject) -> str | None:
    """Returns the cause in two words if the row is known to have caused the error, else None."""
    if error.flagged or _CONTENT_CODE.search(error.codes) or _CONTENT.search(error.message):
        return "content filter"
    if status == 413 or _LONG_CODE.search(error.codes) or _LONG.search(error.message):
        return "too long"
    return None


def _is_busy(error: ErrorObject) -> bool:
    """Returns whether an error that mentions the row is about the state of the endpoint. A code
    decides before the message does."""
    if error.flagged or _CONTENT_CODE.search(error.codes) or _LONG_CODE.search(error.codes):
        return False
    return _BUSY.search(_ADVICE.sub("", error.message)) is not None


def read_answer(data: dict[str, Any], where: str) -> Reply:
    """Returns the answer in a chat completion. Raises the same errors as `read_object` if it has
    none."""
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Unavailable(f"{where}: the reply has no choice with a message")
    if choice.get("error") and (error := ErrorObject.of(choice)):
        fail(200, error, where)
    finish_reason = str(choice.get("finish_reason")).lower()
    if finish_reason in FILTERED:
        raise RowError(f"{where}: the answer was withheld ({finish_reason})", "content filter")
    if message.get("refusal"):
        raise RowError(f"{where}: refused: {shorten(str(message['refusal']))}", "refused")
    end, first_tokens = ENDS.get(finish_reason), read_first_tokens(choice)
    text = read_text(message, was_cut=end == "length" or bool(first_tokens))
    if text is None or end is None:
        has = "text" if text else "no text"
        raise Unavailable(f"{where}: the reply has {has} and finish_reason {finish_reason}")
    usage = data.get("usage")
    tokens = usage if isinstance(usage, dict) else {}
    prompt_tokens, own_tokens = _count(tokens, "prompt_tokens"), _count(tokens, "completion_tokens")
    return Reply(text, end, prompt_tokens, own_tokens, first_tokens)


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds until Retry-After, a number or a date; None if it is neither."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value)
    return max(0.0, seconds) if not math.isnan(seconds) else None


def _seconds_until(date: str) -> float:
    """Returns the seconds until the date in a header; NaN if the text is not a date."""
    try:
        parsed = email.utils.parsedate_tz(date)
        return email.utils.mktime_tz(parsed) - time.time() if parsed else math.nan
    except (ValueError, OverflowError):
        return math.nan
