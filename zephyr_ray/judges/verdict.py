"""Finds the verdict in a judge's reply: its last word, outside its thinking."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from zephyr_ray.judges.literal import literals


@dataclass(frozen=True)
class Verdict:
    """The verdict that one value in a reply states."""

    says: Any
    """A score, a winner or a rating per answer; None if it cannot be read."""
    reason: Any = ""
    """The judge's words for it: a text, or one per answer."""
    fault: str = ""
    """Why it cannot be read, in words for the judge, beginning with "it"."""


Read = Callable[[Any], Verdict | None]
"""Returns the verdict of a literal's value; None if the value does not have the shape of a
verdict."""

_FENCE = re.compile(r"```\w*")
_THINKING = re.compile(
    r"[<◁]\|?(?P<tag_end>/|end_of_|end_)?(?:seed:|begin_of_|start_)?"
    r"(?:think|thinking|thought|reasoning|analysis|reflection|scratchpad)\|?[>▷]"
    r"|\[(?P<bracket_end>/)?think\]"
    r"|<\|channel\|>(?:analysis|commentary|(?P<final>final))",
    re.IGNORECASE,
)
"""Matches the marks that begin and end the thinking of reasoning models."""


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    verdict: Verdict


def last_word(text: str, read: Read, judged: str = "", cut: bool = False) -> Verdict:
    """Returns the verdict of a reply; it says None if the reply has no clear one. Rules for
    all forms:

    - Thinking does not count; a reply cut off in its thinking has no verdict.
    - A value inside unbalanced brackets does not count. Neither does a quote from `judged`, the
      judged texts, unless it is the complete reply: no answer may grade itself.
    - The verdict is the last of the remaining values. If they disagree, if the judged texts say
      the same, or if the reply was `cut` at the token limit, the last one must end the reply, on
      lines of its own or after a label ("Verdict:").
    """
    text = _FENCE.sub("", text)
    begin, spans = _outside_thinking(text, read)
    quotable = {v for literal in literals(judged) if (v := _verdict(literal.value, read))}
    spans = [s for s in spans if not _is_quoted(text, begin, s, judged, quotable)]
    if not spans:
        return Verdict(None, fault="it has nothing of this form outside of reasoning and quotes")
    last = spans[-1]
    if last.verdict.says is None:
        return last.verdict
    if _is_enclosed(text[last.end :]):
        return Verdict(None, fault="its brackets do not match")
    disagree = any(s.verdict.says != last.verdict.says for s in spans)
    # A paraphrased quote still states the same verdict.
    may_be_quote = any(v.says == last.verdict.says for v in quotable)
    if (disagree or may_be_quote or cut) and not _ends_reply(text, begin, last):
        return Verdict(None, fault="it does not end with its only verdict")
    return last.verdict


def _outside_thinking(text: str, read: Read) -> tuple[int, list[_Span]]:
    """Returns where the thinking ends, and the verdicts outside of it."""
    candidates = {
        literal.start: _Span(literal.start, literal.end, verdict)
        for literal in literals(text)
        if (verdict := _verdict(literal.value, read))
    }
    marks = {mark.start(): mark for mark in _THINKING.finditer(text)}
    begin, end, thinking = 0, 0, False
    spans: list[_Span] = []
    for start in sorted(candidates | marks):
        if start in candidates:
            end = candidates[start].end
            if not thinking:
                spans.append(candidates[start])
        elif start >= end:  # a mark inside a value is part of its rationale
            mark = marks[start]
            ends = mark["tag_end"] or mark["bracket_end"] or mark["final"]
            if ends and not thinking:
                spans.clear()  # the chat template may have begun the thinking
            thinking, begin = not ends, mark.end()
    return begin, spans


def _verdict(value: Any, read: Read) -> Verdict | None:
    """Returns the verdict that a literal is or contains; if it contains contradictory ones, a
    verdict that says None."""
    verdicts = list(_verdicts(value, read))
    if len({verdict.says for verdict in verdicts}) > 1:
        return Verdict(None, fault="it contradicts itself")
    return verdicts[0] if verdicts else None


def _verdicts(value: Any, read: Read) -> Iterator[Verdict]:
    if verdict := read(value):
        yield verdict
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _verdicts(inner, read)


def _is_quoted(text: str, begin: int, span: _Span, judged: str, quotable: set[Verdict]) -> bool:
    """Returns whether a verdict is a quote, perhaps with other whitespace or quotation marks. A
    complete reply is not one."""
    if span.verdict not in quotable and text[span.start : span.end] not in judged:
        return False
    return bool(re.search(r"\w", text[begin : span.start] + text[span.end :]))


def _is_enclosed(after: str) -> bool:
    """Returns whether the text after a value closes a bracket that was opened before it."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", after):
        depth += 1 if bracket in "[{" else -1
        if depth < 0:
            return True
    return False


def _ends_reply(text: str, begin: int, span: _Span) -> bool:
    line = max(begin, text.rfind("\n", 0, span.start) + 1)
    label = text[line : span.start].strip(" \t*_`>#")
    rest = text[span.end :].strip(" \t\r\n*_`.")
    return (not label or label.endswith(":")) and not rest
