"""Defines the settings of recipes: strict and frozen, with fields marked by what they name.

An annotation states what a field names, so that checks and plans need no code per kind:

    prompts: Annotated[str, Reads("prompts")]      an earlier stage that makes prompts
    model:   Annotated[str, Reads("weights")]      a model of the recipe, or a stage that trains one
    seeds:   Annotated[str, FILE]                  a file beside the recipe
    workers: Annotated[int, OPERATIONAL] = 1       affects how the work runs, not its result
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.masking import is_secret
from zephyr_ray.recipe_file import mapping

USES = ("weights", "model", "judge")
"""Uses of a model by a stage: weights to train or start from, a model to ask, a judge of
answers."""


@dataclass(frozen=True)
class Reads:
    """The mark of a field that names a stage or a model that the stage reads."""

    what: str
    """A type of artifact ("prompts", "dialogues", …) or one of USES."""
    form: str | None = None
    """The form that a judge must support."""
    forms_in: str | None = None
    """The stage's setting that holds one such form or a list of them."""

    @property
    def is_model(self) -> bool:
        return self.what in USES

    @property
    def artifact(self) -> str:
        """Type of artifact that a stage named here must make, or "any"."""
        return "weights" if self.is_model else self.what

    def forms(self, stage: "Strict") -> list[str]:
        """Returns the forms that a judge must support."""
        named = getattr(stage, self.forms_in) if self.forms_in else []
        forms = [named] if isinstance(named, str) else list(named)
        return [self.form, *forms] if self.form else forms


FILE = "file"
"""Marks the path of a file or folder beside the recipe; the content key hashes its content."""
DATASET = "dataset"
"""Marks a published data set: a hub id, or an address such as s3://bucket/folder."""
WEIGHTS = "weights"
"""Marks weights: a packaged name, a hub id, a folder, or a stage that trains a model."""
OPERATIONAL = "operational"
"""Marks a setting that does not change the result; it is not in the content key."""
ADDED = "added"
"""Marks a setting that did not exist when older artifacts were made; at its default, it is not in
the content key, so that their keys stay valid."""


class Strict(BaseModel):
    """A frozen object that rejects unknown settings, infinity and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


T = TypeVar("T", bound=Strict)


def marked(settings: Strict, mark: type[Reads] | str) -> list[tuple[str, Any, list[str]]]:
    """Returns (field, mark, values) per field with the mark; `values` holds only text values."""
    fields = []
    for name, field in type(settings).model_fields.items():
        # An optional field keeps its Annotated metadata on the field or inside the union.
        marks = [*field.metadata, *(m for a in get_args(field.annotation) for m in get_args(a)[1:])]
        for m in marks:
            if m == mark or (isinstance(mark, type) and isinstance(m, mark)):
                value = getattr(settings, name)
                values = value if isinstance(value, list) else [value]
                fields.append((name, m, [v for v in values if isinstance(v, str)]))
    return fields


def not_in_key(settings: Strict) -> set[str]:
    """Returns the names of settings that the content key omits."""
    return {
        name
        for name, field in type(settings).model_fields.items()
        if OPERATIONAL in field.metadata
        or (
            ADDED in field.metadata
            and getattr(settings, name) == field.get_default(call_default_factory=True)
        )
    }


def typed(cls: type[T], settings: Any, where: str) -> T:
    """Returns settings as an object of the class. Raises Permanent if they are invalid; `where`
    begins the error line."""
    try:
        return cls.model_validate(mapping(settings, where))
    except ValidationError as error:
        # A misspelled setting comes first: it may be why another one is missing.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        path = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _names_beside(cls, first["loc"])
            advice = suggest(str(first["loc"][-1]), known) if known else ""
            message = f"unknown setting '{path}'{advice}"
        elif first["type"] == "missing":
            message = f"setting '{path}' is missing"
        else:
            problem = first["msg"].removeprefix("Value error, ").replace(" after validation", "")
            problem = problem.replace("Tuple", "List").replace("valid tuple", "valid list")
            message = f"setting '{path}': {problem}"
            # A URL without a scheme may hold a password that `masked` does not recognize.
            is_url = any("url" in str(part).lower() for part in first["loc"])
            hidden = is_url and "@" in str(first["input"])
            if not hidden and not any(is_secret(str(part)) for part in first["loc"]):
                is_scalar = isinstance(first["input"], int | float | date)
                quote = "; quote it" if first["type"] == "string_type" and is_scalar else ""
                message += f" (got {first['input']!r}){quote}"
                if first["type"] == "list_type" and isinstance(first["input"], str):
                    message += f"; write [{first['input']}]"
        raise Permanent(f"{where}: {message}") from None


def _names_beside(kind: Any, path: Sequence[str | int]) -> Iterable[str]:
    """Returns the names of the settings at the same level as `path` in a value of type `kind`; none
    if they are not known."""
    if isinstance(kind, type) and issubclass(kind, Strict):
        fields = kind.model_fields
        if len(path) == 1:
            return fields
        return _names_beside(fields[str(path[0])].annotation, path[1:]) if path[0] in fields else ()
    inner = get_args(kind)
    if get_origin(kind) in (dict, list):
        return _names_beside(inner[-1], path[1:])
    if get_origin(kind) is Annotated:
        return _names_beside(inner[0], path)
    if get_origin(kind) in (Union, UnionType):
        return next((names for part in inner if (names := _names_beside(part, path))), ())
    return ()
