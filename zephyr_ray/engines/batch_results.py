"""Reads the results of a finished batch: one per request, or one failure for all."""

import json
from typing import Any

from zephyr_ray.engines.choices import Outcome, read_choices
from zephyr_ray.engines.meter import FREE
from zephyr_ray.engines.replies import ErrorObject, Rejected, Unavailable, fail, read_object
from zephyr_ray.engines.tariff import Usage, read_usage
from zephyr_ray.errors import RowError
from zephyr_ray.models.contract import StopRun

QUEUE_FULL = "token_limit_exceeded"
"""Error code of a batch that has more tokens than may be queued."""

Json = dict[str, Any]
Result = list[Outcome] | Exception
"""The choices of one request, or why it has none."""


class QueueFull(Unavailable):
    """The failure of a batch that may succeed as smaller batches."""


class AnswersLost(StopRun):
    """The answers of a batch were paid for, but the endpoint no longer has them."""


def used_tokens(line: Json) -> Usage | None:
    """Returns the tokens that the request of a result line used; None if unknown, for example
    because there is no line."""
    if not line:
        return None
    response = line.get("response")
    if isinstance(response, dict) and response.get("status_code") == 200:
        return read_usage(response.get("body"))
    return FREE


def read_failure(state: Json, where: str, lines: int) -> Exception:
    """Returns the error of a batch that did not start, which all its requests share."""
    error = ErrorObject.of((state.get("errors") or {}).get("data")) or ErrorObject("no reason")
    if QUEUE_FULL in error.codes:
        kind = QueueFull if lines > 1 else Unavailable
        return kind(f"{where} failed: {error.message}")
    try:
        fail(400, error, f"{where} failed")
    except Unavailable as unavailable:
        return unavailable
    except StopRun as stop:
        return stop
    except (RowError, Rejected) as cause:
        return StopRun(f"{cause}; correct the model's settings")


def read_result(line: Json, state: Json, where: str, count: int) -> Result:
    """Returns the result in a line of an output or error file, whose request was for `count`
    choices."""
    response = line.get("response")
    try:
        if isinstance(response, dict):
            text = json.dumps(response.get("body"))
            data = read_object(int(response.get("status_code") or 0), {}, text, where)
            return read_choices(data, where, count)
        if state["status"] == "cancelled":
            raise StopRun(f"{where} was cancelled; run again to send its other requests")
        fail(200, ErrorObject.of(line.get("error")) or ErrorObject("no result"), where)
    except (RowError, StopRun, Unavailable, Rejected) as error:
        return error
