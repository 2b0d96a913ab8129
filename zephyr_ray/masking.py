"""Keeps secrets out of all text that leaves the program: error lines, logs, tracebacks, MLflow.

A secret is recognized by its form or by its value:

- user and password in a URL, a query parameter or assignment such as `api_key=…`, a bearer token or
  basic credentials;
- the value of an environment variable whose name ends in KEY, KEYS, TOKEN, PASSWORD or SECRET, the
  password in a URL that any environment variable holds, and whatever was passed to `remember`.
"""

import argparse
import base64
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import quote, unquote

MASK = "***"
MIN_LENGTH = 6
"""Shortest value that is masked wherever it occurs; a shorter one would garble ordinary text."""
SECRET_NAME = re.compile(r"(key|keys|token|password|passwd|secret|secrets)([-_](env|data))?$", re.I)
# A URL that was read as a path has only one slash; another URL may follow without whitespace.
_URL = re.compile(r"(\w:/{1,2})((?:(?!\w://)\S)*)")
# A user and the start of a password; a port is not mistaken for one.
_USER = re.compile(r"[^/?#@:]*:\d*[^\d/@]")
_PORT_AND_PATH = re.compile(r"[^/?#@:]*:\d*/[^@]*@")
_URL_WITH_SPACE = re.compile(r"\s*[\w+.-]+:/{1,2}[^\s/?#@:]*:[^\s@]*\s[^@]*@")
_WORD = re.compile(r"\S+")
# The start and the end of user and password in an address without a scheme; the digest of an image
# does not match.
_LOGIN_START = re.compile(r"(?<![\w.%+/-])[\w.%+-]+:(?!\d*/|['\"])")
_LOGIN_END = re.compile(r"@(?=[\w\[])(?!sha\d+:)")
_PARAMETER = r"[\w.-]{0,40}(?:key|token|passw(?:or)?d|secret|signature|credential)|auth|sig|pwd"
_QUERY = re.compile(rf"([?&](?:{_PARAMETER})=)[^\s&#'\"]+", re.I)
_ASSIGNMENT = re.compile(
    r"\b([\w.-]{0,40}(?:(?:api|access|account)[-_]?key|token|passw(?:or)?d|secret)=)[^\s&,;'\"<]+",
    re.I,
)
# Prose such as "Basic training" has neither a digit nor a capital letter in its second word.
_HEADER = re.compile(r"\b([Bb]earer|[Bb]asic) (?=[^\s'\"]*[A-Z0-9])[^\s'\",]{8,}")

_remembered: set[str] = set()


def remember(secret: str) -> str:
    """Masks this value from now on, in this process; returns it."""
    _remembered.add(secret)
    return secret


def masked(text: object) -> str:
    """Returns the text with `***` in place of every known secret, and URLs without user and
    password."""
    result = _URL.sub(lambda url: url[1] + url[2][len(_userinfo(url[2])) :], str(text))
    result = _WORD.sub(lambda word: _without_login(word[0]), result) if "@" in result else result
    for pattern in (_QUERY, _ASSIGNMENT):
        result = pattern.sub(rf"\1{MASK}", result)
    result = _HEADER.sub(rf"\1 {MASK}", result)
    values = {form for secret in _secrets() for form in _forms(secret) if len(form) >= MIN_LENGTH}
    # The longest first: one secret may contain another.
    for value in sorted(values, key=len, reverse=True):
        result = result.replace(value, MASK)
    return result


def has_credentials(text: str) -> bool:
    """Returns whether the text contains a URL with a user, a password or a secret parameter. Unlike
    `masked`, also suspects a password that looks like a port and a path, or has whitespace."""
    return bool(
        any(_userinfo(rest) or _PORT_AND_PATH.match(rest) for _, rest in _URL.findall(text))
        or _URL_WITH_SPACE.match(text)
        or ("://" in text and _QUERY.search(text))
    )


def is_secret(name: str) -> bool:
    """Returns whether a setting or variable of this name holds a secret, or names one."""
    return SECRET_NAME.search(name) is not None


def _secrets() -> Iterator[str]:
    yield from _remembered
    for name, value in os.environ.items():
        if is_secret(name):
            yield value
        for _, rest in _URL.findall(value) if "@" in value else ():
            # If a path contains "@" too, it is unknown which one ends the password.
            userinfo = _userinfo(rest)[:-1]
            for part in {userinfo, userinfo.partition("@")[0]}:
                user, colon, password = part.partition(":")
                yield password if colon else user
                # The form in which HTTP clients send user and password.
                yield base64.b64encode(unquote(f"{user}:{password}").encode()).decode()


def _userinfo(rest: str) -> str:
    """Returns the user and password, including the "@", of what follows a URL's slashes.

    A password may contain "/", "?", "#" and "@". No regular expression searches for it, because
    that would limit its length or take quadratic time.
    """
    authority = rest if _USER.match(rest) else re.split("[/?#]", rest, maxsplit=1)[0]
    return authority[: authority.rfind("@") + 1]


def _without_login(word: str) -> str:
    """Returns a word with `***` in place of user and password in an address without a scheme."""
    ends = [end.start() for end in _LOGIN_END.finditer(word)]
    start = _LOGIN_START.search(word, 0, ends[-1]) if ends else None
    # A password has at least one character.
    if start is None or start.end() >= ends[-1]:
        return word
    return f"{word[: start.start()]}{MASK}{word[ends[-1] :]}"


def _forms(secret: str) -> Iterator[str]:
    """Yields the value as clients quote it; also its lines, or the items of a list."""
    for part in (secret, *map(str.strip, re.split(r"[\r\n,]", secret))):
        yield part
        yield unquote(part)
        yield quote(part, safe="")
        yield json.dumps(part)[1:-1]
        yield part.encode("unicode_escape").decode()


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors, which quote arguments, are masked."""

    def error(self, message: str) -> NoReturn:
        super().error(masked(message))


def install() -> None:
    """Masks all log records and the tracebacks of uncaught exceptions of this process."""
    make = logging.getLogRecordFactory()

    def make_masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # logging itself reports arguments that do not fit
            return record
        if (safe := masked(message)) != message:
            record.msg, record.args = safe, None
        if record.exc_info and record.exc_info[0]:
            # Formatters print this text if it is set.
            record.exc_text = masked(logging.Formatter().formatException(record.exc_info))
        return record

    def print_masked(*error: Any) -> None:
        print(masked("".join(traceback.format_exception(*error))), end="", file=sys.stderr)

    def print_thread_masked(thread: Any) -> None:
        if thread.exc_type is not SystemExit:  # it ends the thread and is not an error
            print_masked(thread.exc_type, thread.exc_value, thread.exc_traceback)

    logging.setLogRecordFactory(make_masked)
    sys.excepthook, threading.excepthook = print_masked, print_thread_masked
