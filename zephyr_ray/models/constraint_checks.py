"""Checks one answer against one constraint: one function per kind.

A check takes the stripped answer, the constraint and the bare instruction. It reads the answer and
never runs it, because answers come from models.
"""

import json
import re
from typing import Any

ConstraintResult = tuple[bool, str]
"""Whether the answer keeps the constraint, and the reason as one line for a person."""

LANGUAGES = {"English": "en", "Spanish": "es", "French": "fr"}

_BULLET = re.compile(r"^[ \t]*[*-][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d{1,4})[.)][ \t]+\S", re.MULTILINE)
_FENCE = re.compile(r"\A```(?:json)?(.*)```\Z", re.DOTALL | re.IGNORECASE)
_ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|mrs?|ms|dr|st|a\.m|p\.m|u\.s|approx)\.", re.IGNORECASE
)
# A full stop inside closing quotes ends a sentence only if no lower-case word follows.
_SENTENCE_BREAK = re.compile(r"(?<![.!?])[.!?]++(?:\s+|[\"')\]”’]+\s+(?![a-z]))")
_SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*\Z")


def words(text: str) -> list[str]:
    """Returns the case-folded words of a text, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.casefold())


def has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _count_words(text: str) -> int:
    """Counts the stretches between spaces that contain a letter or digit, as a person would."""
    return sum(any(char.isalnum() for char in word) for word in text.split())


def _flat(text: str) -> str:
    return " ".join(text.casefold().split())


def uppercase(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    lower = sum(char.islower() for char in text)
    ok = not lower and any(char.isupper() for char in text)
    return ok, f"capital letters asked for, {lower} small letters found"


def lowercase(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    upper = sum(char.isupper() for char in text)
    ok = not upper and any(char.islower() for char in text)
    return ok, f"small letters asked for, {upper} capital letters found"


def one_sentence(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    plain = _ABBREVIATION.sub("abbreviation", text[:-1]) + text[-1:]
    lines = [line for line in plain.splitlines() if words(line)]
    count = sum(bool(words(part)) for line in lines for part in _SENTENCE_BREAK.split(line))
    if count == 1 and not _SENTENCE_END.search(text):
        return False, "one sentence asked for, its end mark is missing"
    return count == 1, f"one sentence asked for, {count} found"


def bullets(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    count = len(_BULLET.findall(text))
    return count == args["n"], f"{args['n']} bullets asked for, {count} found"


def numbered(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    ok = numbers == list(range(1, args["n"] + 1))
    return ok, f"items numbered 1 to {args['n']} asked for, found {numbers or 'none'}"


def max_words(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    count = _count_words(text)
    return count <= args["n"], f"at most {args['n']} words asked for, {count} found"


def min_words(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    count = _count_words(text)
    return count >= args["n"], f"at least {args['n']} words asked for, {count} found"


def include_word(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    ok = has_word(text, args["word"])
    return ok, f"the word '{args['word']}' asked for, {'found' if ok else 'not found'}"


def avoid_word(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    used = has_word(text, args["word"])
    return not used, f"no '{args['word']}' asked for, {'found' if used else 'none found'}"


def start_with(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    opening, flat = _flat(args["phrase"]), _flat(text)
    rest = flat[len(opening) :]
    ok = flat.startswith(opening) and not rest[:1].isalnum() and bool(words(rest))
    return ok, f"a start with '{args['phrase']}' and more asked for, found '{text[:40]}'"


def end_with(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    # The final mark may be missing: "Good luck" passes for "Good luck!".
    closing, flat = _flat(args["phrase"]).rstrip(".! "), _flat(text).rstrip(".! ")
    rest = flat[: len(flat) - len(closing)]
    ok = flat.endswith(closing) and not rest[-1:].isalnum() and bool(words(rest))
    return ok, f"an end with '{args['phrase']}' after more asked for, found '{text[-40:]}'"


def quoted(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    ok = text[0] + text[-1] in ('""', "“”") and not re.search(r"[\"“”]", text[1:-1])
    return ok, f"one pair of double quotes around all asked for, {'found' if ok else 'not found'}"


def json_answer(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
        answer = value.get("answer") if isinstance(value, dict) else None
        written = "" if answer is None else json.dumps(answer, ensure_ascii=False)
    except (ValueError, RecursionError):
        return False, "a JSON object asked for, the text is not JSON"
    ok = any(char.isalnum() for char in written)
    return ok, f"a JSON object with an 'answer' asked for, {'found' if ok else 'not found'}"


def no_commas(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    count = sum(text.count(mark) for mark in ",，、،")
    return not count, f"no commas asked for, {count} found"


def repeat_question(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    request, answer = words(instruction), words(text)
    if answer[: len(request)] != request:
        return False, "the request word for word asked for first, not found"
    more = len(answer) - len(request)
    return more > 0, f"the request and then an answer asked for, {more} words follow it"


def language(text: str, args: dict[str, Any], instruction: str) -> ConstraintResult:
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # the detector samples: without a seed its results vary
    try:
        detected = detect(text)
    except LangDetectException:
        detected = "none"
    wanted = LANGUAGES[args["language"]]
    return detected == wanted, f"language {wanted} asked for, {detected} found"
