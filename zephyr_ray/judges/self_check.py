"""Checks a judge by its own ratings: parse failures, agreement with itself, and bias by length and
position."""

from dataclasses import asdict, dataclass
from typing import Any

from zephyr_ray.judges.agreement import krippendorff_alpha, spearman
from zephyr_ray.judges.form import Rating
from zephyr_ray.section import Column, Table


@dataclass(frozen=True)
class Rated:
    """One answer with its ratings by name; those that could not be parsed are missing."""

    id: str
    model: str
    """The model that gave the answer."""
    characters: int
    """Length of the answer."""
    ratings: dict[str, Rating]


@dataclass(frozen=True)
class SelfCheck:
    """The check of one rating of a judge."""

    name: str
    rated: int
    """Answers with this rating."""
    mean: float | None
    mean_by_model: dict[str, float]
    not_applicable: int
    """Answers to which it does not apply, according to the judge."""
    unparsable: int
    """Answers whose rating could not be parsed."""
    length_correlation: float | None
    """Spearman's correlation of rating and length."""
    position_correlation: float | None
    """Spearman's correlation of rating and place in the order; None if the form has no order."""
    rated_again: int = 0
    """Answers rated twice, in two orders."""
    alpha: float | None = None
    """Krippendorff's ordinal alpha of the two ratings."""
    same: float | None = None
    """Share of answers rated twice whose ratings are equal."""

    def counts(self) -> dict[str, float]:
        """Returns the figures that become counts of the manifest."""
        names = ("length_correlation", "position_correlation", "alpha")
        known = {name: getattr(self, name) for name in names}
        return {f"{n}/{self.name}": v for n, v in known.items() if v is not None}


def self_check(name: str, answers: list[Rated], again: list[Rated]) -> SelfCheck:
    """Checks one rating of the answers; `again` are those that were rated in another order too."""
    given = [(a, a.ratings[name]) for a in answers if name in a.ratings]
    rated = [(a, r.value, r.position) for a, r in given if r.value is not None]
    values = [value for _, value, _ in rated]
    by_model: dict[str, list[float]] = {}
    for answer, rating, _ in rated:
        by_model.setdefault(answer.model, []).append(rating)
    placed = [(value, position) for _, value, position in rated if position is not None]
    first = {a.id: value for a, value, _ in rated}
    pairs = [
        (first[a.id], second)
        for a in again
        if a.id in first and name in a.ratings and (second := a.ratings[name].value) is not None
    ]
    return SelfCheck(
        name=name,
        rated=len(rated),
        mean=sum(values) / len(values) if values else None,
        mean_by_model={model: sum(v) / len(v) for model, v in by_model.items()},
        not_applicable=len(given) - len(rated),
        unparsable=len(answers) - len(given),
        length_correlation=spearman(values, [a.characters for a, _, _ in rated]),
        position_correlation=spearman([v for v, _ in placed], [p for _, p in placed]),
        rated_again=len(pairs),
        alpha=krippendorff_alpha(pairs),
        same=sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
    )


def to_json(checks: list[SelfCheck]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


def means_table(checks: list[dict[str, Any]]) -> Table:
    """Returns the table of each model's mean ratings, for the report."""
    models = dict.fromkeys(model for check in checks for model in check["mean_by_model"])
    rows = tuple((m, *(check["mean_by_model"].get(m) for check in checks)) for m in models)
    columns = (Column(_title(check), digits=2) for check in checks)
    return Table((Column("Model"), *columns), rows, "Mean ratings")


def check_table(checks: list[dict[str, Any]]) -> Table:
    """Returns the table of the check, for the report; omits columns without a value, and counts
    that are all 0."""
    columns = {
        "rated": Column("Rated", digits=0),
        "mean": Column("Mean", digits=2),
        "not_applicable": Column("N/A", digits=0),
        "unparsable": Column("Unparsable", digits=0),
        "length_correlation": Column("By length", digits=2, signed=True),
        "position_correlation": Column("By position", digits=2, signed=True),
        "rated_again": Column("Rated again", digits=0),
        "alpha": Column("Agreement", digits=2, signed=True),
        "same": Column("Same rating", digits=2),
    }
    values = {name: [check.get(name) for check in checks] for name in columns}
    shown = [n for n in columns if any(v or isinstance(v, float) for v in values[n])]
    # A form without an order has nothing to rate again.
    checks = [check | {"rated_again": check["rated_again"] or None} for check in checks]
    rows = tuple((_title(check), *(check.get(name) for name in shown)) for check in checks)
    help = [
        "By length: rank correlation (Spearman) of rating and length, over the rated answers; 0 is "
        "no preference."
    ]
    if "position_correlation" in shown:
        help.append("By position: the same for the answer's place in the judge's question.")
    if "rated_again" in shown:
        help.append(
            "Agreement: Krippendorff's ordinal α of the first ratings and those of the answers "
            "rated again in another order; 1 is full agreement, 0 is chance."
        )
    return Table(
        (Column("Rating"), *(columns[name] for name in shown)),
        rows,
        "How far the judge can be trusted",
        tuple(help),
    )


def _title(check: dict[str, Any]) -> str:
    return str(check["name"]).replace("_", " ").capitalize()
