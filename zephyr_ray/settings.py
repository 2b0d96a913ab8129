"""Settings as a recipe writes them: strict, frozen, and marked where they point at something else.

What a field points at is said in its annotation, so that checking, hashing and planning need no
code for each kind:

    prompts: Annotated[str, Reads("prompts")]      an earlier stage that makes prompts
    model:   Annotated[str, Reads("weights")]      a model of the recipe, or a stage that trains one
    seeds:   Annotated[str, FILE]                  a file, beside the recipe
    workers: Annotated[int, OPERATIONAL] = 1       how the work runs, not what comes out
"""

from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from zephyr_ray.errors import Permanent
from zephyr_ray.recipe_file import mapping


@dataclass(frozen=True)
class Reads:
    """Marks a field that names what the stage reads.

    `what` is an artifact type ("prompts", "dialogues", …), "weights" (something to train or to
    start from), "model" (someone who answers) or "judge" (someone who compares answers).
    """

    what: str


FILE = "file"
OPERATIONAL = "operational"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


T = TypeVar("T", bound=Strict)


def marked(spec: Strict, mark: type[Reads] | str) -> list[tuple[str, Any, list[str]]]:
    """The fields that carry a mark, as (field, mark, values); absent values are left out."""
    found = []
    for name, field in type(spec).model_fields.items():
        # An optional field keeps its Annotated metadata on the field or inside the union.
        marks = [*field.metadata, *(m for a in get_args(field.annotation) for m in get_args(a)[1:])]
        for m in marks:
            if m == mark or (isinstance(mark, type) and isinstance(m, mark)):
                value = getattr(spec, name)
                values = value if isinstance(value, list) else [value]
                found.append((name, m, [str(v) for v in values if v is not None]))
    return found


def near(name: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def typed(cls: type[T], settings: Any, where: str) -> T:
    """Settings as written, as an object of the class; what does not fit is one Permanent line."""
    try:
        return cls.model_validate(mapping(settings, where))
    except ValidationError as error:
        # A misspelt name first: the right one may be missing because of it.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        place = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            known = cls.model_fields if len(first["loc"]) == 1 else {}
            message = f"unknown setting '{place}'{near(place, known) if known else ''}"
        elif first["type"] == "missing":
            message = f"setting '{place}' is missing"
        else:
            message = f"setting '{place}': {first['msg']} (got {first['input']!r})"
        raise Permanent(f"{where}: {message}") from None
