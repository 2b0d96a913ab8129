"""Settings as a recipe writes them: strict, frozen, with marks on fields that name something else.

The annotation says what a field names, so that checking and planning need no code per kind:

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

USES = ("weights", "model", "judge")
"""What a stage reads a model for: to train or start from, to answer prompts, to judge answers."""


@dataclass(frozen=True)
class Reads:
    """Marks a field that names what the stage reads: an artifact type ("prompts", "dialogues", …)
    or one of USES."""

    what: str
    form: str | None = None
    """The form that a judge must judge by."""

    @property
    def is_model(self) -> bool:
        return self.what in USES


FILE = "file"
"""Marks the path of a file or folder beside the recipe; its content is in the key."""
WEIGHTS = "weights"
"""Marks weights: a packaged name, a hub id, a folder, or a stage that trains a model."""
OPERATIONAL = "operational"
"""Marks what does not change the result, so that it is not in the key."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


T = TypeVar("T", bound=Strict)


def marked(spec: Strict, mark: type[Reads] | str) -> list[tuple[str, Any, list[str]]]:
    """Returns the fields that carry a mark, as (field, mark, values), without absent values."""
    fields = []
    for name, field in type(spec).model_fields.items():
        # An optional field keeps its Annotated metadata on the field or inside the union.
        marks = [*field.metadata, *(m for a in get_args(field.annotation) for m in get_args(a)[1:])]
        for m in marks:
            if m == mark or (isinstance(mark, type) and isinstance(m, mark)):
                value = getattr(spec, name)
                values = value if isinstance(value, list) else [value]
                fields.append((name, m, [str(v) for v in values if v is not None]))
    return fields


def near(name: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def typed(cls: type[T], settings: Any, where: str) -> T:
    """Returns settings as an object of the class. Raises Permanent if they do not fit."""
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
            what = first["msg"].removeprefix("Value error, ")
            message = f"setting '{place}': {what} (got {first['input']!r})"
        raise Permanent(f"{where}: {message}") from None
