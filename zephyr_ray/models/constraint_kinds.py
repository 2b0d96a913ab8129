"""Defines the kinds of constraint: one function per kind, which checks an answer.

A check takes the stripped answer and the constraint's arguments. It reads the answer and never runs
it, because answers come from models.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from json import dumps, loads

import regex

from zephyr_ray.models.spacing import WORD, spaced

ConstraintResult = tuple[bool, str]
"""Whether the answer satisfies the constraint, and the reason in one line."""

LANGUAGES = {"English": "en", "Spanish": "es", "French": "fr"}

Values = tuple[int, ...] | tuple[str, ...]


@dataclass(frozen=True)
class ConstraintKind:
    phrasings: tuple[str, ...]
    """Sentences that ask for it; `{n}` stands for the argument `n`."""
    check: Callable[..., ConstraintResult]
    values: dict[str, Values]
    """Values to draw from, by argument."""
    closed: bool
    """Whether an argument must be one of `values`; otherwise any value of that type is valid."""
    reads_instruction: bool
    """Whether the check also takes the bare instruction."""


KINDS: dict[str, ConstraintKind] = {}

_BULLET = re.compile(r"^[ \t]*[*-][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d{1,4})[.)][ \t]+\S", re.MULTILINE)
_FENCE = re.compile(r"\A```(?:json)?(.*)```\Z", re.DOTALL | re.IGNORECASE)
_ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|mrs?|ms|dr|st|a\.m|p\.m|u\.s|approx)\.", re.IGNORECASE
)
# A full stop inside closing quotes ends a sentence only if no lowercase word follows.
_SENTENCE_BREAK = re.compile(r"(?<![.!?])[.!?]++(?:\s+|[\"')\]”’]+\s+(?![a-z]))")
_WORD = regex.compile(rf"{WORD}(?:['’]{WORD})*", regex.V1)
_SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*\Z")


def words(text: str) -> list[str]:
    """Returns the case-folded words of a text, without punctuation."""
    return _WORD.findall(spaced(text).casefold())


def has_word(text: str, word: str) -> bool:
    wanted, letter = regex.escape(spaced(word).strip()), r"[\p{L}\p{N}\p{M}_]"
    pattern = rf"(?<!{letter}){wanted}(?!{letter})"
    return regex.search(pattern, spaced(text), regex.IGNORECASE) is not None


def _count_words(text: str) -> int:
    """Counts words as a person would: text between spaces with at least one letter or digit."""
    return sum(any(char.isalnum() for char in word) for word in spaced(text).split())


def _flat(text: str) -> str:
    return " ".join(spaced(text).casefold().split())


def _kind(
    *phrasings: str, closed: bool = False, reads_instruction: bool = False, **values: Values
) -> Callable[[Callable[..., ConstraintResult]], Callable[..., ConstraintResult]]:
    """Adds the decorated check to KINDS under its name."""

    def add(check: Callable[..., ConstraintResult]) -> Callable[..., ConstraintResult]:
        KINDS[check.__name__] = ConstraintKind(phrasings, check, values, closed, reads_instruction)
        return check

    return add


@_kind(
    "Write your whole answer in capital letters.",
    "Use only uppercase letters in your answer.",
    "Answer in ALL CAPS.",
)
def uppercase(text: str) -> ConstraintResult:
    lower = sum(char.islower() for char in text)
    ok = not lower and any(char.isupper() for char in text)
    return ok, f"capital letters asked for, {lower} lowercase letters found"


@_kind(
    "Write your whole answer in lowercase letters.",
    "Use no capital letters in your answer.",
    "Keep every letter of your answer small.",
)
def lowercase(text: str) -> ConstraintResult:
    upper = sum(char.isupper() for char in text)
    ok = not upper and any(char.islower() for char in text)
    return ok, f"lowercase letters asked for, {upper} capital letters found"


@_kind(
    "Answer in exactly one sentence.",
    "Give your answer as a single sentence.",
    "Use just one sentence.",
)
def one_sentence(text: str) -> ConstraintResult:
    plain = _ABBREVIATION.sub("abbreviation", text[:-1]) + text[-1:]
    lines = [line for line in plain.splitlines() if words(line)]
    count = sum(bool(words(part)) for line in lines for part in _SENTENCE_BREAK.split(line))
    if count == 1 and not _SENTENCE_END.search(text):
        return False, "one sentence asked for, its end punctuation is missing"
    return count == 1, f"one sentence asked for, {count} found"


@_kind(
    'Answer with exactly {n} bullet points, each on its own line and starting with "* ".',
    "Give exactly {n} bullets, one per line, each beginning with a dash and a space.",
    'Write a list of {n} bullet points and mark each with "* ".',
    n=(2, 3),
)
def bullets(text: str, n: int) -> ConstraintResult:
    count = len(_BULLET.findall(text))
    return count == n, f"{n} bullets asked for, {count} found"


@_kind(
    'Answer with a numbered list of exactly {n} items, like "1. ".',
    "Number your points from 1 to {n}, one per line.",
    "Give {n} items as a numbered list.",
    n=(2, 3),
)
def numbered(text: str, n: int) -> ConstraintResult:
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    ok = numbers == list(range(1, n + 1))
    return ok, f"items numbered 1 to {n} asked for, found {numbers or 'none'}"


@_kind(
    "Use at most {n} words.",
    "Keep your answer to {n} words or fewer.",
    "Do not write more than {n} words.",
    n=(8, 10, 12, 15),
)
def max_words(text: str, n: int) -> ConstraintResult:
    count = _count_words(text)
    return count <= n, f"at most {n} words asked for, {count} found"


@_kind(
    "Use at least {n} words.",
    "Write {n} words or more.",
    "Your answer must not be shorter than {n} words.",
    n=(12, 15, 20),
)
def min_words(text: str, n: int) -> ConstraintResult:
    count = _count_words(text)
    return count >= n, f"at least {n} words asked for, {count} found"


@_kind(
    'Use the word "{word}" in your answer.',
    'Your answer must contain the word "{word}".',
    'Make sure that the word "{word}" appears.',
    word=("because", "simple", "people", "often", "together", "enjoy", "small", "today"),
)
def include_word(text: str, word: str) -> ConstraintResult:
    ok = has_word(text, word)
    return ok, f"the word '{word}' asked for, {'found' if ok else 'not found'}"


# Natural answers are likely to use these words, so avoiding them takes effort.
@_kind(
    'Do not use the word "{word}".',
    'Answer without the word "{word}".',
    'The word "{word}" must not appear in your answer.',
    word=("and", "it", "you", "can", "the", "very"),
)
def avoid_word(text: str, word: str) -> ConstraintResult:
    used = has_word(text, word)
    return not used, f"no '{word}' asked for, {'found' if used else 'none found'}"


@_kind(
    'Start your answer with "{phrase}".',
    'The first words of your answer must be "{phrase}".',
    'Begin with the words "{phrase}".',
    phrase=("In short", "Of course", "Happy to help", "Good question", "My friend"),
)
def start_with(text: str, phrase: str) -> ConstraintResult:
    opening, flat = _flat(phrase), _flat(text)
    rest = flat[len(opening) :]
    ok = flat.startswith(opening) and not rest[:1].isalnum() and bool(words(rest))
    return ok, f"'{phrase}' at the start and more text asked for, found '{text[:40]}'"


@_kind(
    'End your answer with "{phrase}"',
    'The last words of your answer must be "{phrase}"',
    'Finish with the words "{phrase}"',
    phrase=("I hope this helps.", "Good luck!", "Have a nice day!", "That is all."),
)
def end_with(text: str, phrase: str) -> ConstraintResult:
    # The final punctuation may be missing: "Good luck" passes for "Good luck!".
    closing, flat = _flat(phrase).rstrip(".! "), _flat(text).rstrip(".! ")
    rest = flat[: len(flat) - len(closing)]
    ok = flat.endswith(closing) and not rest[-1:].isalnum() and bool(words(rest))
    return ok, f"'{phrase}' at the end and more text asked for, found '{text[-40:]}'"


@_kind(
    "Put your whole answer in double quotes.",
    "Wrap the entire answer in double quotation marks.",
    "Begin and end your answer with a double quote mark.",
)
def quoted(text: str) -> ConstraintResult:
    ok = text[0] + text[-1] in ('""', "“”") and not re.search(r"[\"“”]", text[1:-1])
    return ok, f"one pair of enclosing double quotes asked for, {'found' if ok else 'not found'}"


@_kind(
    'Answer with a JSON object that has the key "answer".',
    'Reply only with JSON, like {{"answer": "..."}}.',
    'Give your answer as a JSON object with one key, "answer".',
)
def json(text: str) -> ConstraintResult:
    fenced = _FENCE.match(text)
    try:
        value = loads(fenced[1] if fenced else text)
        answer = value.get("answer") if isinstance(value, dict) else None
        written = "" if answer is None else dumps(answer, ensure_ascii=False)
    except (ValueError, RecursionError):
        return False, "a JSON object asked for, the text is not JSON"
    ok = any(char.isalnum() for char in written)
    return ok, f"a JSON object with an 'answer' asked for, {'found' if ok else 'not found'}"


@_kind(
    "Do not use any commas.",
    "Write your answer without commas.",
    "Your answer must not contain a comma.",
)
def no_commas(text: str) -> ConstraintResult:
    count = sum(text.count(mark) for mark in ",，、،")
    return not count, f"no commas asked for, {count} found"


@_kind(
    "First repeat this request word for word, then answer it.",
    "Before you answer, copy the request above exactly.",
    "Say my request again without changing a word, then give the answer.",
    reads_instruction=True,
)
def repeat_question(text: str, instruction: str) -> ConstraintResult:
    request, answer = words(instruction), words(text)
    if answer[: len(request)] != request:
        return False, "the request repeated at the start asked for, not found"
    more = len(answer) - len(request)
    return more > 0, f"an answer after the request asked for, {more} words found"


@_kind(
    "Answer in {language}.",
    "Write your whole answer in {language}.",
    closed=True,
    language=tuple(LANGUAGES),
)
def language(text: str, language: str) -> ConstraintResult:
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # the detector samples: without a seed its results vary
    try:
        detected = detect(text)
    except LangDetectException:
        detected = "none"
    wanted = LANGUAGES[language]
    return detected == wanted, f"language {wanted} asked for, {detected} found"
