"""Draw, phrase and check constraints that code can verify; the `rules` judge scores with them.

A constraint is plain data: `{"kind": "max_words", "n": 15}`. Its kind lists the sentences that ask
for it, the values to draw its arguments from, and the check of an answer. `instruction` is always
the bare task, without the sentence that asks for the constraint.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.models import constraint_checks as checks
from zephyr_ray.models.constraint_checks import ConstraintResult, has_word, words

Check = Callable[[str, dict[str, Any], str], ConstraintResult]


@dataclass(frozen=True)
class ConstraintKind:
    """One kind of constraint."""

    phrasings: tuple[str, ...]
    """Sentences that ask for it; `{n}` stands for the argument `n`."""
    check: Check
    values: dict[str, tuple[int, ...] | tuple[str, ...]] = field(default_factory=dict)
    """Values to draw from, by argument."""
    closed: bool = False
    """Whether an argument must be one of `values`; otherwise any value of that type is valid."""


def validate(constraint: dict[str, Any]) -> None:
    """Raises Permanent unless the kind is known and has exactly its arguments, each valid."""
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
        elif not isinstance(value, str) or not words(value):
            raise Permanent(f"constraint {name!r}: {arg} must be a text with a word, not {value!r}")


def phrase(rng: random.Random, constraint: dict[str, Any]) -> str:
    """Returns a random sentence that asks for this constraint, to append to the instruction."""
    validate(constraint)
    return rng.choice(KINDS[constraint["kind"]].phrasings).format(**constraint)


def draw(
    rng: random.Random, instruction: str, kinds: list[str] | None = None
) -> tuple[dict[str, Any], str]:
    """Returns a random constraint, by default of DEFAULT_KINDS, and a sentence asking for it."""
    name = rng.choice(DEFAULT_KINDS if kinds is None else kinds)
    if name not in KINDS:
        raise Permanent(f"unknown constraint kind {name!r}; known kinds: {', '.join(KINDS)}")
    constraint: dict[str, Any] = {"kind": name}
    for arg, values in KINDS[name].values.items():
        # Words of the instruction make the constraint trivial or impossible.
        fresh = [value for value in values if not has_word(instruction, str(value))]
        constraint[arg] = rng.choice(fresh or values)
    return constraint, phrase(rng, constraint)


def holds(constraint: dict[str, Any], text: str, instruction: str) -> ConstraintResult:
    """Returns whether the text keeps the constraint, and why.

    Raises Permanent if the constraint is malformed."""
    validate(constraint)
    if not any(char.isalnum() for char in text):
        return False, "the answer is empty"
    return KINDS[constraint["kind"]].check(text.strip(), constraint, instruction)


KINDS: dict[str, ConstraintKind] = {
    "uppercase": ConstraintKind(
        (
            "Write your whole answer in capital letters.",
            "Use only uppercase letters in your answer.",
            "Answer in ALL CAPS.",
        ),
        checks.uppercase,
    ),
    "lowercase": ConstraintKind(
        (
            "Write your whole answer in lowercase letters.",
            "Use no capital letters in your answer.",
            "Keep every letter of your answer small.",
        ),
        checks.lowercase,
    ),
    "one_sentence": ConstraintKind(
        (
            "Answer in exactly one sentence.",
            "Give your answer as a single sentence.",
            "Use just one sentence.",
        ),
        checks.one_sentence,
    ),
    "bullets": ConstraintKind(
        (
            'Answer with exactly {n} bullet points, each on its own line and starting with "* ".',
            "Give exactly {n} bullets, one per line, each beginning with a dash and a space.",
            'Write a list of {n} bullet points and mark each with "* ".',
        ),
        checks.bullets,
        {"n": (2, 3)},
    ),
    "numbered": ConstraintKind(
        (
            'Answer with a numbered list of exactly {n} items, like "1. ".',
            "Number your points from 1 to {n}, one per line.",
            "Give {n} items as a numbered list.",
        ),
        checks.numbered,
        {"n": (2, 3)},
    ),
    "max_words": ConstraintKind(
        (
            "Use at most {n} words.",
            "Keep your answer to {n} words or fewer.",
            "Do not write more than {n} words.",
        ),
        checks.max_words,
        {"n": (8, 10, 12, 15)},
    ),
    "min_words": ConstraintKind(
        (
            "Use at least {n} words.",
            "Write {n} words or more.",
            "Your answer must not be shorter than {n} words.",
        ),
        checks.min_words,
        {"n": (12, 15, 20)},
    ),
    "include_word": ConstraintKind(
        (
            'Use the word "{word}" in your answer.',
            'Your answer must contain the word "{word}".',
            'Make sure that the word "{word}" appears.',
        ),
        checks.include_word,
        {"word": ("because", "simple", "people", "often", "together", "enjoy", "small", "today")},
    ),
    # Natural answers are likely to use these words, so avoiding them takes care.
    "avoid_word": ConstraintKind(
        (
            'Do not use the word "{word}".',
            'Answer without the word "{word}".',
            'The word "{word}" must not appear in your answer.',
        ),
        checks.avoid_word,
        {"word": ("and", "it", "you", "can", "the", "very")},
    ),
    "start_with": ConstraintKind(
        (
            'Start your answer with "{phrase}".',
            'The first words of your answer must be "{phrase}".',
            'Begin with the words "{phrase}".',
        ),
        checks.start_with,
        {"phrase": ("In short", "Of course", "Happy to help", "Good question", "My friend")},
    ),
    "end_with": ConstraintKind(
        (
            'End your answer with "{phrase}"',
            'The last words of your answer must be "{phrase}"',
            'Finish with the words "{phrase}"',
        ),
        checks.end_with,
        {"phrase": ("I hope this helps.", "Good luck!", "Have a nice day!", "That is all.")},
    ),
    "quoted": ConstraintKind(
        (
            "Put your whole answer in double quotes.",
            "Wrap the entire answer in double quotation marks.",
            "Begin and end your answer with a double quote mark.",
        ),
        checks.quoted,
    ),
    "json": ConstraintKind(
        (
            'Answer with a JSON object that has the key "answer".',
            'Reply only with JSON, like {{"answer": "..."}}.',
            'Give your answer as a JSON object with one key, "answer".',
        ),
        checks.json_answer,
    ),
    "no_commas": ConstraintKind(
        (
            "Do not use any commas.",
            "Write your answer without commas.",
            "Your answer must not contain a comma.",
        ),
        checks.no_commas,
    ),
    "repeat_question": ConstraintKind(
        (
            "First repeat this request word for word, then answer it.",
            "Before you answer, copy the request above exactly.",
            "Say my request again without changing a word, then give the answer.",
        ),
        checks.repeat_question,
    ),
    "language": ConstraintKind(
        ("Answer in {language}.", "Write your whole answer in {language}."),
        checks.language,
        {"language": tuple(checks.LANGUAGES)},
        closed=True,
    ),
}

# Without `language`: on a short text a detector guesses.
DEFAULT_KINDS = [name for name in KINDS if name != "language"]
