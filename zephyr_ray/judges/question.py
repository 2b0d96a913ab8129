"""Defines the questions of judge forms: their wording, which a recipe's file can replace."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.recipe_file import read_yaml

SHIPPED = Path(__file__).with_name("questions.yaml")
"""The wording of all shipped forms. If you change that of `score` or `pairwise`, raise the versions
of the stages that judge: `feedback`, `clean` and `pairwise`. Content keys hash that of other forms
(`judges.form_identity`)."""


@dataclass(frozen=True)
class Question:
    """A question of a judge form."""

    name: str
    """Name of its wording in a file of questions."""
    wording: str
    """The text, with placeholders such as $prompt; $$ is a dollar sign."""

    @classmethod
    def shipped(cls, name: str) -> "Question":
        return cls(name, _shipped()[name])

    def fill(self, values: dict[str, str], wording: str | None = None) -> str:
        """Returns the question for these values of its placeholders; `wording` replaces its own."""
        return Template(self.wording if wording is None else wording).substitute(values)

    def check(self, wording: str) -> None:
        """Raises Permanent if a wording and the question's own differ in their placeholders."""
        if not Template(wording).is_valid():
            raise Permanent("has a $ that begins no placeholder; write $$ for a dollar sign")
        own, other = (set(Template(text).get_identifiers()) for text in (self.wording, wording))
        if unknown := sorted(other - own):
            raise Permanent(f"has an unknown placeholder ${unknown[0]}{suggest(unknown[0], own)}")
        if missing := sorted(own - other):
            raise Permanent(f"lacks the placeholder ${missing[0]}; add it")


def read_questions(path: Path, questions: Iterable[Question]) -> dict[str, str]:
    """Returns the wordings in a file, by the names of the questions whose wording they replace.
    Raises Permanent if the file cannot be read, or a wording does not fit its question."""
    known = {question.name: question for question in questions}
    wordings = read_yaml(path, "questions")
    for name, wording in wordings.items():
        if name not in known:
            raise Permanent(f"{path}: unknown question '{name}'{suggest(str(name), known)}")
        if not isinstance(wording, str):
            raise Permanent(f"{path}: '{name}' is not text; write its wording after '{name}: |-'")
        try:
            known[name].check(wording)
        except Permanent as error:
            raise Permanent(f"{path}: '{name}' {error}") from None
    return wordings


@cache
def _shipped() -> dict[str, str]:
    return {name: str(wording) for name, wording in read_yaml(SHIPPED, "questions").items()}
