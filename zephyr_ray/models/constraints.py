"""Constraints on an answer that code can check: what the `rules` judge knows.

A constraint is plain data, `{"kind": "max_words", "n": 15}`. A kind knows how to ask for itself in
words, how to draw its arguments, and how to check an answer. `instruction` is always the bare task,
without the sentence that asks for the constraint. Texts come from models: they are only read.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zephyr_ray.errors import Permanent

Verdict = tuple[bool, str]
Check = Callable[[str, dict[str, Any], str], Verdict]

LANGUAGES = {"English": "en", "Spanish": "es", "French": "fr"}

# A loop: the same line, or the same run of six words (overlaps count), three times; or a unit of
# 1-4 letters written twelve times with nothing between. One repeat can be honest: a request may be
# repeated before it is answered.
LOOP_WORDS, LOOP_TIMES, LOOP_UNITS = 6, 3, 12

_ITEM_MARK = re.compile(r"^\s*(?:[*-]|\d+[.)])\s+")
_BULLET = re.compile(r"^[ \t]*[*-][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d{1,4})[.)][ \t]+\S", re.MULTILINE)
_FENCE = re.compile(r"\A```(?:json)?(.*)```\Z", re.DOTALL | re.IGNORECASE)
_ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|mrs?|ms|dr|st|a\.m|p\.m|u\.s|approx)\.", re.IGNORECASE
)
# A full stop inside closing quotes ends the sentence only when no lower-case word goes on after it.
_SENTENCE_BREAK = re.compile(r"(?<![.!?])[.!?]++(?:\s+|[\"')\]”’]+\s+(?![a-z]))")
_SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*\Z")
_UNIT_LOOP = re.compile(rf"([^\W\d_]{{1,4}}?)\1{{{LOOP_UNITS - 1},}}")


@dataclass(frozen=True)
class Constraint:
    """One kind. `values` gives each argument's name and the values it is drawn from; other values
    of the same type are as good unless `closed`."""

    phrasings: tuple[str, ...]
    check: Check
    values: dict[str, tuple[int, ...] | tuple[str, ...]] = field(default_factory=dict)
    closed: bool = False

    def sample(self, rng: random.Random, instruction: str) -> dict[str, Any]:
        """Draw the arguments; a word the instruction already has is drawn only if none is left."""
        drawn: dict[str, Any] = {}
        for name, values in self.values.items():
            fresh = [value for value in values if not _has_word(instruction, str(value))]
            drawn[name] = rng.choice(fresh or values)
        return drawn

    def verdict(self, text: str, args: dict[str, Any], instruction: str) -> Verdict:
        """Check a text; one without a letter or digit never holds."""
        if not any(char.isalnum() for char in text):
            return False, "the answer is empty"
        return self.check(text.strip(), args, instruction)

    def holds(self, text: str, args: dict[str, Any], instruction: str) -> bool:
        return self.verdict(text, args, instruction)[0]


def validate(constraint: dict[str, Any]) -> None:
    """Raise Permanent unless the kind is known and has exactly its arguments, each usable."""
    if not isinstance(constraint, dict) or "kind" not in constraint:
        raise Permanent(f"constraint {constraint!r} has no kind; write it as {{'kind': ..., ...}}")
    name = constraint["kind"]
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise Permanent(f"unknown constraint kind {name!r}; known kinds: {', '.join(KINDS)}")
    given = constraint.keys() - {"kind"}
    if missing := kind.values.keys() - given:
        raise Permanent(f"constraint {name!r} lacks {', '.join(sorted(missing))}")
    if extra := given - kind.values.keys():
        raise Permanent(f"constraint {name!r} takes no {', '.join(sorted(map(str, extra)))}")
    for arg, values in kind.values.items():
        value = constraint[arg]
        if kind.closed and value not in values:
            raise Permanent(
                f"constraint {name!r}: {arg} must be one of {', '.join(map(str, values))}"
            )
        if isinstance(values[0], int):
            if type(value) is not int or value < 1:
                raise Permanent(
                    f"constraint {name!r}: {arg} must be a whole number from 1, not {value!r}"
                )
        elif not isinstance(value, str) or not _words(value):
            raise Permanent(f"constraint {name!r}: {arg} must be a text with a word, not {value!r}")


def phrase(rng: random.Random, constraint: dict[str, Any]) -> str:
    """One of the sentences that ask for this constraint, to append to the instruction."""
    validate(constraint)
    return rng.choice(KINDS[constraint["kind"]].phrasings).format(**constraint)


def draw(
    rng: random.Random, instruction: str, kinds: list[str] | None = None
) -> tuple[dict[str, Any], str]:
    """A random constraint (of `kinds`, by default DEFAULT_KINDS) and the sentence asking for it."""
    name = rng.choice(DEFAULT_KINDS if kinds is None else kinds)
    if name not in KINDS:
        raise Permanent(f"unknown constraint kind {name!r}; known kinds: {', '.join(KINDS)}")
    constraint = {"kind": name, **KINDS[name].sample(rng, instruction)}
    return constraint, phrase(rng, constraint)


def holds(constraint: dict[str, Any], text: str, instruction: str) -> Verdict:
    """Whether the text keeps the constraint, and why, for a person to read. Any text is allowed;
    a malformed constraint raises Permanent."""
    validate(constraint)
    return KINDS[constraint["kind"]].verdict(text, constraint, instruction)


def loops(text: str) -> bool:
    """Whether the text is caught in a repetition loop; thresholds are LOOP_* above."""
    lines = Counter(_ITEM_MARK.sub("", line).strip().casefold() for line in text.splitlines())
    words = _words(text)
    runs = Counter(tuple(words[at : at + LOOP_WORDS]) for at in range(len(words) - LOOP_WORDS + 1))
    return (
        any(times >= LOOP_TIMES for line, times in lines.items() if _words(line))
        or any(times >= LOOP_TIMES for times in runs.values())
        or _UNIT_LOOP.search(text) is not None
    )


def _words(text: str) -> list[str]:
    """The case-folded words of a text, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.casefold())


def _count_words(text: str) -> int:
    """Words as a person counts them: stretches between spaces that hold a letter or digit."""
    return sum(any(char.isalnum() for char in word) for word in text.split())


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _flat(text: str) -> str:
    return " ".join(text.casefold().split())


def _uppercase(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    lower = sum(char.islower() for char in text)
    ok = not lower and any(char.isupper() for char in text)
    return ok, f"capital letters asked for, {lower} small letters found"


def _lowercase(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    upper = sum(char.isupper() for char in text)
    ok = not upper and any(char.islower() for char in text)
    return ok, f"small letters asked for, {upper} capital letters found"


def _one_sentence(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    plain = _ABBREVIATION.sub("abbreviation", text[:-1]) + text[-1:]
    lines = [line for line in plain.splitlines() if _words(line)]
    found = sum(bool(_words(part)) for line in lines for part in _SENTENCE_BREAK.split(line))
    if found == 1 and not _SENTENCE_END.search(text):
        return False, "one sentence asked for, its end mark is missing"
    return found == 1, f"one sentence asked for, {found} found"


def _bullets(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    found = len(_BULLET.findall(text))
    return found == args["n"], f"{args['n']} bullets asked for, {found} found"


def _numbered(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    found = [int(number) for number in _NUMBERED.findall(text)]
    ok = found == list(range(1, args["n"] + 1))
    return ok, f"items numbered 1 to {args['n']} asked for, found {found or 'none'}"


def _max_words(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    found = _count_words(text)
    return found <= args["n"], f"at most {args['n']} words asked for, {found} found"


def _min_words(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    found = _count_words(text)
    return found >= args["n"], f"at least {args['n']} words asked for, {found} found"


def _include_word(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    ok = _has_word(text, args["word"])
    return ok, f"the word '{args['word']}' asked for, {'found' if ok else 'not found'}"


def _avoid_word(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    found = _has_word(text, args["word"])
    return not found, f"no '{args['word']}' asked for, {'found' if found else 'none found'}"


def _start_with(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    phrase_, flat = _flat(args["phrase"]), _flat(text)
    rest = flat[len(phrase_) :]
    ok = flat.startswith(phrase_) and not rest[:1].isalnum() and bool(_words(rest))
    return ok, f"a start with '{args['phrase']}' and more asked for, found '{text[:40]}'"


def _end_with(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    # The final mark is forgiven: "Good luck" for "Good luck!" keeps the wish.
    phrase_, flat = _flat(args["phrase"]).rstrip(".! "), _flat(text).rstrip(".! ")
    rest = flat[: len(flat) - len(phrase_)]
    ok = flat.endswith(phrase_) and not rest[-1:].isalnum() and bool(_words(rest))
    return ok, f"an end with '{args['phrase']}' after more asked for, found '{text[-40:]}'"


def _quoted(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    ok = text[0] + text[-1] in ('""', "“”") and not re.search(r"[\"“”]", text[1:-1])
    return ok, f"one pair of double quotes around all asked for, {'found' if ok else 'not found'}"


def _json(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
        answer = value.get("answer") if isinstance(value, dict) else None
        said = "" if answer is None else json.dumps(answer, ensure_ascii=False)
    except (ValueError, RecursionError):
        return False, "a JSON object asked for, the text is not JSON"
    ok = any(char.isalnum() for char in said)
    return ok, f"a JSON object with an 'answer' asked for, {'found' if ok else 'not found'}"


def _no_commas(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    found = sum(text.count(mark) for mark in ",，、،")
    return not found, f"no commas asked for, {found} found"


def _repeat_question(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    asked, found = _words(instruction), _words(text)
    if found[: len(asked)] != asked:
        return False, "the request word for word asked for first, not found"
    more = len(found) - len(asked)
    return more > 0, f"the request and then an answer asked for, {more} words follow it"


def _language(text: str, args: dict[str, Any], instruction: str) -> Verdict:
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # the detector draws samples: without a seed verdicts vary
    try:
        found = detect(text)
    except LangDetectException:
        found = "none"
    wanted = LANGUAGES[args["language"]]
    return found == wanted, f"language {wanted} asked for, {found} found"


KINDS: dict[str, Constraint] = {
    "uppercase": Constraint(
        (
            "Write your whole answer in capital letters.",
            "Use only uppercase letters in your answer.",
            "Answer in ALL CAPS.",
        ),
        _uppercase,
    ),
    "lowercase": Constraint(
        (
            "Write your whole answer in lowercase letters.",
            "Use no capital letters in your answer.",
            "Keep every letter of your answer small.",
        ),
        _lowercase,
    ),
    "one_sentence": Constraint(
        (
            "Answer in exactly one sentence.",
            "Give your answer as a single sentence.",
            "Use just one sentence.",
        ),
        _one_sentence,
    ),
    "bullets": Constraint(
        (
            'Answer with exactly {n} bullet points, each on its own line and starting with "* ".',
            "Give exactly {n} bullets, one per line, each beginning with a dash and a space.",
            'Write a list of {n} bullet points and mark each with "* ".',
        ),
        _bullets,
        {"n": (2, 3)},
    ),
    "numbered": Constraint(
        (
            'Answer with a numbered list of exactly {n} items, like "1. ".',
            "Number your points from 1 to {n}, one per line.",
            "Give {n} items as a numbered list.",
        ),
        _numbered,
        {"n": (2, 3)},
    ),
    "max_words": Constraint(
        (
            "Use at most {n} words.",
            "Keep your answer to {n} words or fewer.",
            "Do not write more than {n} words.",
        ),
        _max_words,
        {"n": (8, 10, 12, 15)},
    ),
    "min_words": Constraint(
        (
            "Use at least {n} words.",
            "Write {n} words or more.",
            "Your answer must not be shorter than {n} words.",
        ),
        _min_words,
        {"n": (12, 15, 20)},
    ),
    "include_word": Constraint(
        (
            'Use the word "{word}" in your answer.',
            'Your answer must contain the word "{word}".',
            'Make sure that the word "{word}" appears.',
        ),
        _include_word,
        {"word": ("because", "simple", "people", "often", "together", "enjoy", "small", "today")},
    ),
    # Words that a natural answer is likely to use, so that keeping the rule takes care.
    "avoid_word": Constraint(
        (
            'Do not use the word "{word}".',
            'Answer without the word "{word}".',
            'The word "{word}" must not appear in your answer.',
        ),
        _avoid_word,
        {"word": ("and", "it", "you", "can", "the", "very")},
    ),
    "start_with": Constraint(
        (
            'Start your answer with "{phrase}".',
            'The first words of your answer must be "{phrase}".',
            'Begin with the words "{phrase}".',
        ),
        _start_with,
        {"phrase": ("In short", "Of course", "Happy to help", "Good question", "My friend")},
    ),
    "end_with": Constraint(
        (
            'End your answer with "{phrase}"',
            'The last words of your answer must be "{phrase}"',
            'Finish with the words "{phrase}"',
        ),
        _end_with,
        {"phrase": ("I hope this helps.", "Good luck!", "Have a nice day!", "That is all.")},
    ),
    "quoted": Constraint(
        (
            "Put your whole answer in double quotes.",
            "Wrap the entire answer in double quotation marks.",
            "Begin and end your answer with a double quote mark.",
        ),
        _quoted,
    ),
    "json": Constraint(
        (
            'Answer with a JSON object that has the key "answer".',
            'Reply only with JSON, like {{"answer": "..."}}.',
            'Give your answer as a JSON object with one key, "answer".',
        ),
        _json,
    ),
    "no_commas": Constraint(
        (
            "Do not use any commas.",
            "Write your answer without commas.",
            "Your answer must not contain a comma.",
        ),
        _no_commas,
    ),
    "repeat_question": Constraint(
        (
            "First repeat this request word for word, then answer it.",
            "Before you answer, copy the request above exactly.",
            "Say my request again without changing a word, then give the answer.",
        ),
        _repeat_question,
    ),
    "language": Constraint(
        ("Answer in {language}.", "Write your whole answer in {language}."),
        _language,
        {"language": tuple(LANGUAGES)},
        closed=True,
    ),
}

# Language is left to those who ask for it: a detector is a guess on a short text, not a check.
DEFAULT_KINDS = [name for name in KINDS if name != "language"]
