"""Draws, phrases and checks constraints that code can verify; the `rules` judge scores with them.

A constraint is plain data: `{"kind": "max_words", "n": 15}`. `instruction` is always the bare task,
without the sentence that asks for the constraint.
"""

import random
from reprlib import repr as short
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.models.constraint_kinds import KINDS, ConstraintResult, has_word, words

# `language` is excluded, because language detectors are unreliable on short texts.
DEFAULT_KINDS = [name for name in KINDS if name != "language"]

MAX_COUNT, MAX_CHARACTERS = 9_999, 200
"""Maximum of a numeric argument, and maximum characters of a text argument; checks may take time
and memory in proportion to them."""


def validate(constraint: dict[str, Any]) -> None:
    """Raises Permanent unless the kind is known and has exactly its arguments, each valid."""
    if not isinstance(constraint, dict) or "kind" not in constraint:
        raise Permanent(
            f"constraint {short(constraint)} has no kind; write it as {{'kind': ..., ...}}"
        )
    name = constraint["kind"]
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise Permanent(f"unknown constraint kind {short(name)}; known kinds: {', '.join(KINDS)}")
    given = constraint.keys() - {"kind"}
    if missing := kind.values.keys() - given:
        raise Permanent(f"constraint {name!r} lacks {', '.join(sorted(missing))}; add it")
    if extra := given - kind.values.keys():
        raise Permanent(
            f"constraint {name!r} takes no {', '.join(sorted(map(str, extra)))}; remove it"
        )
    for arg, values in kind.values.items():
        value = constraint[arg]
        if kind.closed and value not in values:
            raise Permanent(
                f"constraint {name!r}: {arg} must be one of {', '.join(map(str, values))}"
            )
        if isinstance(values[0], int):
            if type(value) is not int or not 1 <= value <= MAX_COUNT:
                raise Permanent(
                    f"constraint {name!r}: {arg} must be a whole number from 1 to {MAX_COUNT}, "
                    f"not {short(value)}"
                )
        elif not isinstance(value, str) or len(value) > MAX_CHARACTERS or not words(value):
            raise Permanent(
                f"constraint {name!r}: {arg} must be text with at least one word and at most "
                f"{MAX_CHARACTERS} characters, not {short(value)}"
            )


def phrase(rng: random.Random, constraint: dict[str, Any]) -> str:
    """Returns a random sentence that asks for this constraint, to append to the instruction."""
    validate(constraint)
    return rng.choice(KINDS[constraint["kind"]].phrasings).format(**constraint)


def draw(
    rng: random.Random, instruction: str, kinds: list[str] | None = None
) -> tuple[dict[str, Any], str]:
    """Returns a random constraint, by default from DEFAULT_KINDS, and a sentence asking for it."""
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
    """Returns whether the text satisfies the constraint, and why.

    Raises Permanent if the constraint is malformed."""
    validate(constraint)
    if not any(char.isalnum() for char in text):
        return False, "the answer is empty"
    kind = KINDS[constraint["kind"]]
    arguments = {name: constraint[name] for name in kind.values}
    if kind.reads_instruction:
        arguments["instruction"] = instruction
    return kind.check(text.strip(), **arguments)
