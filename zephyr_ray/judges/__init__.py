"""Lists the judge forms by name. A new form is one file and one line here."""

from pkgutil import resolve_name

from zephyr_ray.judges.form import Form, unreadable

_NAMES = (
    "zephyr_ray.judges.score:Score",
    "zephyr_ray.judges.pairwise:Ranking",
)
__all__ = ["FORMS", "reply_tokens", "unreadable"]

FORMS: dict[str, Form] = {form.name: form() for form in map(resolve_name, _NAMES)}


def reply_tokens(form: str) -> int:
    """Returns the maximum tokens per reply of a judge by a form."""
    calls = FORMS[form].calls(1, 0, 0)
    return int(calls.tokens_out / calls.calls)
