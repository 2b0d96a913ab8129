"""Shares the rows of a stage among a pool of models by rendezvous hashing.

Each model has its own hash for each text, and the models with the smallest hashes get the text. So
a model that is added to a pool takes over the texts for which it ranks high enough, and changes
nothing else: the requests to other models stay the same, and their logged answers are reused.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from zephyr_ray.demand import Calls
from zephyr_ray.engines.model import Model
from zephyr_ray.errors import RowError
from zephyr_ray.models.contract import Ask
from zephyr_ray.row_actor import Flaw, Program, Row, no_flaw
from zephyr_ray.rows import run_rows
from zephyr_ray.stage import Work

TOO_LONG = "too long"
"""Cause of the RowError of a prompt that does not fit a model's context."""
REQUEST_FIELDS = {"member", "sample", "last"}
"""Fields of a request besides those of its row: the model that answers; what distinguishes the
request from equal ones to that model; whether no other model is left for the row."""


def _check_distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("names a model twice; remove one")
    return names


def _check_names(value: Any) -> Any:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("must be the name of a model, or a list of names")
    if not names:
        raise ValueError("is empty; name a model")
    _check_distinct(names)
    return value


Distinct = AfterValidator(_check_distinct)
"""Marks a list of models in which each name occurs once."""
Names = Annotated[str | list[str], BeforeValidator(_check_names)]
"""A setting that is the name of one model, or a list of names: a pool."""


def names_of(models: str | list[str]) -> list[str]:
    return [models] if isinstance(models, str) else models


def share_calls(total: Calls, names: list[str]) -> dict[str, Calls]:
    """Returns the expected calls of each model of a pool; hashing distributes rows evenly."""
    n = len(names)
    return dict.fromkeys(names, Calls(total.calls / n, total.tokens_in / n, total.tokens_out / n))


def rank(seed: int, text: str, names: Iterable[str]) -> list[str]:
    """Returns the names in the order in which they get the text. The order of two names does not
    depend on the other names."""
    text_hash = hashlib.sha256(json.dumps([seed, text]).encode()).digest()

    def key(name: str) -> tuple[bytes, str]:
        return hashlib.sha256(text_hash + json.dumps(name).encode()).digest(), name

    return sorted(dict.fromkeys(names), key=key)


@dataclass(frozen=True)
class ModelPool:
    """Models that share the rows of a stage. A single model gets every row."""

    models: list[Model]
    seed: int

    @staticmethod
    def of(work: Work, models: str | list[str], seed: int) -> "ModelPool":
        return ModelPool([work.models[name] for name in names_of(models)], seed)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(model.name for model in self.models))

    def run(
        self,
        work: Work,
        rows: list[Row],
        program: Program,
        flaw: Flaw = no_flaw,
        per_row: int | None = None,
    ) -> list[list[Row]]:
        """Returns the results of each row, without those of failed requests: `per_row` results by
        the first models in the row's ranking, or one result if it is None. If the pool has fewer
        models, they answer again in the same order.

        A row that is too long for a model goes to the next model of its ranking; its result names
        those models in "too_long_for". The row fails only if it is too long for all models. Each
        result has the "id" of its row, and its model in "model". Can be called again, like
        `run_rows`.
        """
        shares = {share.row["id"]: share for share in self._shares(rows, per_row)}
        requests: dict[str, Row] = {}
        moved = 1
        while moved:
            requests |= {r["id"]: r for share in shares.values() for r in share.requests()}
            results = {
                result["id"]: result
                for result in run_rows(
                    work,
                    list(requests.values()),
                    partial(_ask_member, program=program),
                    self.models,
                    partial(_flaw, flaw=flaw),
                )
            }
            moved = sum(share.move(results) for share in shares.values())
        for name in self.names:
            faults = [
                f"{share.row['id']}: {share.too_long_for[name]}"
                for share in shares.values()
                if name in share.too_long_for
            ]
            if faults:
                work.counts[f"{TOO_LONG}/{name}"] = len(faults)
                work.examples[f"{TOO_LONG}/{name}"] = faults[:3]
        return [shares[row["id"]].results(results) for row in rows]

    def count_made(self, work: Work, models: Iterable[str]) -> None:
        """Counts the results of each model of the pool; `models` has one name per result."""
        if len(self.names) > 1:
            made = Counter(models)
            work.counts |= {f"made/{name}": made[name] for name in self.names}

    def _shares(self, rows: list[Row], per_row: int | None) -> Iterator["_Share"]:
        seen = Counter[str]()
        for row in rows:
            # Requests for new prompts have no prompt.
            text = row.get("prompt")
            place = row["id"] if text is None else seen[text]
            seen[text or ""] += 1
            yield _Share(row, rank(self.seed, text or row["id"], self.names), per_row, place)


@dataclass
class _Share:
    """The requests for one row."""

    row: Row
    ranking: list[str]
    per_row: int | None
    place: int | str
    """Number of earlier rows with the same prompt; the row's id if it has no prompt."""
    too_long_for: dict[str, str] = field(default_factory=dict)
    """Error lines by model."""

    def requests(self) -> list[Row]:
        """Returns the requests, without those to models that the row is too long for. If it is too
        long for all, they go to the first model, and fail."""
        left = [name for name in self.ranking if name not in self.too_long_for]
        names = left or self.ranking[:1]
        requests = []
        for number in range(self.per_row or 1):
            member, repeat = names[number % len(names)], number // len(names)
            parts = [self.row["id"]]
            parts += [member] if len(self.ranking) > 1 else []
            parts += [str(repeat)] if self.per_row else []
            parts += [] if left else ["last"]  # a new id, because the earlier one has a result
            request = {"member": member, "sample": [self.place, repeat], "last": len(left) < 2}
            requests.append(self.row | request | {"id": "/".join(parts)})
        return requests

    def move(self, results: dict[str, Row]) -> int:
        """Records the models that the row turned out to be too long for; returns their number."""
        answered = [(r["member"], results[r["id"]]) for r in self.requests() if r["id"] in results]
        too_long = {member: r["too_long"] for member, r in answered if "too_long" in r}
        self.too_long_for |= too_long
        return len(too_long)

    def results(self, results: dict[str, Row]) -> list[Row]:
        """Returns the results of the row; `results` are those of all requests, by their ids."""
        first_choice = {r["id"] for r in replace(self, too_long_for={}).requests()}
        made = []
        for request in self.requests():
            if request["id"] in results:
                result = results[request["id"]]
                result = {k: v for k, v in result.items() if k not in REQUEST_FIELDS}
                result |= {"id": self.row["id"], "model": request["member"]}
                if request["id"] not in first_choice:
                    result["too_long_for"] = list(self.too_long_for)
                made.append(result)
        return made


async def _ask_member(row: Row, ask: Ask, *, program: Program) -> Row:
    """Runs the program. If the row is too long for its model but may fit another one, returns a
    result that says so; otherwise raises the same errors as the program."""
    try:
        return await program(row, ask)
    except RowError as error:
        if row["last"] or error.cause != TOO_LONG:
            raise
        return {"id": row["id"], "too_long": str(error)}


def _flaw(result: Row, *, flaw: Flaw) -> RowError | None:
    return None if "too_long" in result else flaw(result)
