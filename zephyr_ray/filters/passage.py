"""Defines what a filter reads and what it returns.

Cleaning applies a list of filters to each passage and removes a passage at the first fault.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from zephyr_ray.formatting import shorten

DROPPED = "dropped/"
"""Prefix of the counts of rules."""
EXAMPLES = 3
"""Maximum examples per rule."""


@dataclass(frozen=True)
class Passage:
    """A prompt and, unless the row is only a prompt, the answer to it."""

    tasks: tuple[str, ...]
    """The questions, without the sentences that state a constraint."""
    prompt: str
    """The questions as the model sees them."""
    answer: str | None = None
    system: tuple[str, ...] = ()
    """Texts of system messages and tools between the previous answer and this one."""
    rejected: str | None = None
    """The answer that a pair rejects."""
    score: float | None = None
    """The judge's score of the answer."""

    def texts(self) -> list[str]:
        """Returns all texts except the rejected answer."""
        return [self.prompt, *self.system, *([self.answer] if self.answer is not None else ())]


@dataclass(frozen=True)
class Fault:
    """The rule that a passage breaks."""

    rule: str
    fix: str = "increase the number of prompts"
    """Fix for the error line if no row is left."""
    evidence: str = ""
    """The part of the passage that breaks the rule."""
    is_removed: bool = True
    """Whether the passage is removed; otherwise it is only counted."""


@dataclass(frozen=True)
class Filter:
    """A function that finds the fault of a passage, if it has one."""

    find: Callable[[Passage], Fault | None]
    rules: tuple[str, ...] = ()
    """Rules that are counted even if no passage breaks them, to show that they were applied."""


@dataclass
class Tally:
    """Counts, up to three examples per count, and the fix of each rule."""

    counts: dict[str, float] = field(default_factory=dict)
    examples: dict[str, list[Any]] = field(default_factory=dict)
    fixes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, examples: Iterable[Any] = (), count: float = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + count
        for example in examples:
            kept = self.examples.setdefault(name, [])
            if len(kept) < EXAMPLES:
                kept.append(example)

    def merge(self, other: "Tally") -> None:
        for name, count in other.counts.items():
            self.add(name, other.examples.get(name, ()), count)
        self.fixes |= other.fixes

    def expect(self, filters: Iterable[Filter]) -> None:
        """Adds a count of 0 for each rule of the filters that has none."""
        for item in filters:
            for rule in item.rules:
                self.add(f"{DROPPED}{rule}", count=0)

    def check(self, passage: Passage, filters: Iterable[Filter]) -> Fault | None:
        """Returns the first fault for which the passage is removed, if any; counts faults that do
        not remove it."""
        for item in filters:
            fault = item.find(passage)
            if fault and fault.is_removed:
                return fault
            if fault:
                self.add(fault.rule)
        return None

    def remove(self, passage: Passage, fault: Fault, left: str) -> None:
        """Counts a removed passage; `left` says what is left of its row."""
        name = f"{DROPPED}{fault.rule}"
        self.fixes[name] = fault.fix
        example = {"prompt": passage.prompt}
        if passage.answer is not None:
            example["answer"] = passage.answer
        if fault.evidence:
            example["why"] = shorten(fault.evidence)
        self.add(name, [{**example, "left": left}])
