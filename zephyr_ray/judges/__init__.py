"""Lists the judge forms by name. A new form is one file and one line here."""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name

from zephyr_ray.judges import question
from zephyr_ray.judges.comparison import Comparison
from zephyr_ray.judges.form import (
    Answer,
    Form,
    Judgement,
    LogprobForm,
    RatingForm,
    Row,
    unreadable,
)
from zephyr_ray.judges.inquiry import Inquiry
from zephyr_ray.models.contract import Ask
from zephyr_ray.store import content_key

_NAMES = (
    "zephyr_ray.judges.score:Score",
    "zephyr_ray.judges.pairwise:Ranking",
    "zephyr_ray.judges.aspects:Aspects",
    "zephyr_ray.judges.critique:Critique",
    "zephyr_ray.judges.turn_score:TurnScore",
    "zephyr_ray.judges.token:Token",
    "zephyr_ray.judges.brackets:Brackets",
)
__all__ = [
    "FORMS",
    "LOGPROB_FORMS",
    "PAIRWISE_FORMS",
    "RATING_FORMS",
    "form_identity",
    "judge",
    "read_questions",
    "reply_tokens",
    "unreadable",
]

FORMS: dict[str, Form] = {form.name: form() for form in map(resolve_name, _NAMES)}
RATING_FORMS = {name: form for name, form in FORMS.items() if isinstance(form, RatingForm)}
"""The forms for feedback."""
PAIRWISE_FORMS = {name: form for name, form in FORMS.items() if isinstance(form, Comparison)}
"""The forms that compare two answers."""
LOGPROB_FORMS = {name: form for name, form in FORMS.items() if isinstance(form, LogprobForm)}
"""The forms that need a judge that gives log-probabilities."""


async def judge(
    form: str,
    row: Row,
    answers: list[Answer],
    ask: Ask,
    wordings: Mapping[str, str] | None = None,
) -> Judgement:
    """Returns the judgement of a language model by a form, with the number of questions that were
    `asked_again`, if any. `wordings` replace those of the forms' questions, by name."""
    inquiry = Inquiry(ask, wordings)
    judgement = await FORMS[form].judge(row, answers, inquiry)
    return judgement | ({"asked_again": inquiry.repeated} if inquiry.repeated else {})


def read_questions(path: Path) -> dict[str, str]:
    """Returns the wordings in a file by the names of the questions that they replace. Raises
    Permanent if it cannot be read, or a wording does not fit its question."""
    return question.read_questions(path, [q for form in FORMS.values() for q in form.questions])


def form_identity(form: str) -> list[str]:
    """Returns what content keys hash of a form: its name and the wording of its questions."""
    return [form, content_key({q.name: q.wording for q in FORMS[form].questions})]


def reply_tokens(form: str) -> int:
    """Returns the maximum tokens per reply in a form; for a form that judges any number of
    answers, the maximum for one answer."""
    calls = FORMS[form].calls(1, 0, 0)
    return int(calls.tokens_out / calls.calls)
