"""Streams published data as dialogues, pairs, prompts or feedback, from a hub data set or from
local files.

The columns of UltraChat-200k (`prompt_id, messages`), of UltraChat (`data`), of
UltraFeedback-binarized (`prompt, prompt_id, chosen, rejected, score_chosen, score_rejected`), and
those that `published_feedback.py` reads need no mapping. Conversations may have any form that
`conversations.py` reads. Unusable rows are counted by reason.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import islice, tee
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from zephyr_ray.conversations import Unreadable
from zephyr_ray.errors import Permanent
from zephyr_ray.published_feedback import FEEDBACK
from zephyr_ray.published_files import (
    FIRST,
    FORMATS,
    data_files,
    first_rows,
    located_rows,
    stream,
)
from zephyr_ray.published_rows import (
    DIALOGUES,
    PAIRS,
    PROMPTS,
    SCORE_RULES,
    Row,
    Unusable,
    disagreement,
)
from zephyr_ray.settings import ADDED, DATASET, FILE
from zephyr_ray.stage import BoundedStage, Stage, Work

CONVERSIONS = {
    "dialogues": DIALOGUES,
    "pairs": PAIRS,
    "prompts": PROMPTS,
    "feedback": FEEDBACK,
}
NAMES = {
    "id": ("prompt_id",),
    "messages": ("messages", "conversations"),
    "turns": ("data",),
    "completions": ("completions", "answers"),
}
"""Column names in published data sets, if they differ from ours; the first one present is read."""
SCORES = ("score_chosen", "score_rejected")


class Published(BoundedStage):
    """Reads rows from `dataset` (a hub id, or an address such as s3://bucket/folder/*.parquet) or
    from `files` (a file or a folder of Parquet, JSONL or Arrow files, or a file with a JSON
    list)."""

    kind = "published"
    limits = "The limits of the published data apply; see its own card."

    makes: Literal["dialogues", "pairs", "prompts", "feedback"]  # type: ignore[misc]
    dataset: Annotated[str | None, DATASET] = None
    files: Annotated[str | None, FILE] = None
    split: str = "train"
    """A split of the hub data set. In a folder, files with this prefix (train.jsonl,
    train-00000-of-00003.parquet); for train, all files if no file name mentions a split."""
    revision: str | None = None
    """A branch, tag or commit of the hub data set."""
    columns: dict[str, str] = {}
    """Maps our column names to those in the data."""
    limit: int | None = Field(None, ge=1)
    """Maximum usable rows, from the start of the data."""
    ties: Annotated[Literal["keep", "drop"], ADDED] = "keep"
    """Treatment of pairs whose scores tie or contradict the choice; they are counted."""
    exclude: Annotated[dict[str, list[str]], ADDED] = {}
    """Drops and counts rows that have one of these values in a column of the data, such as
    {source: [truthful_qa]}."""

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if (self.dataset is None) == (self.files is None):
            raise Permanent("dataset: and files: are both set or both missing; set exactly one")
        columns = CONVERSIONS[self.makes].columns
        if unknown := sorted(set(self.columns) - set(columns)):
            raise Permanent(
                f"columns: '{unknown[0]}' is not a column of {self.makes}; choose from "
                f"{', '.join(columns)}"
            )
        if self.ties == "drop" and "score_chosen" not in columns:
            raise Permanent(f"ties: {self.makes} are not pairs; remove ties:")
        if self.files:
            paths = data_files(files["files"], self.split)
            unusable = Unusable()
            usable = [self._has_usable(path, first_rows(path), unusable) for path in paths]
            if not any(usable):
                unusable.refuse(files["files"])

    def expected(self, rows: dict[str, int]) -> int | None:
        size = SIZES.get((self.dataset or "", self.split), (None,))[0]
        return min(self.limit, size) if self.limit and size else self.limit or size

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        """Returns the published mean, if it is known."""
        rows, tokens = SIZES.get((self.dataset or "", self.split), (0, None))
        return tokens / rows if tokens else None

    def run(self, work: Work) -> None:
        work.counts["characters"] = 0
        work.counts |= {f"dropped/{rule}": 0 for rule in self._exclusions()}
        work.progress.total = self.expected({}) or 0
        work.write_rows(islice(self._usable(work), self.limit))
        if not work.counts["rows"]:
            raise Permanent(
                f"stage '{work.name}': the data has no rows, or only empty or excluded ones; "
                "change the files, split or exclude setting"
            )
        dropped = sum(n for rule, n in work.counts.items() if rule.startswith("dropped/"))
        sound = (*SCORE_RULES, *self._exclusions())
        work.check_dropped(int(work.counts["rows"] + dropped), sound=sound)

    def _usable(self, work: Work) -> Iterator[Row]:
        for number, raw in enumerate(self._raw(work)):
            row = self._renamed(raw)
            # Published ids may repeat; the row number makes them unique.
            row_id = f"r{number:07d}" if row.get("id") is None else f"{row['id']}/{number}"
            if rule := self._exclusion(raw):
                work.drop(rule, row_id)
                continue
            try:
                converted = self._convert(row)
            except Unreadable as reason:
                work.drop(str(reason), row_id)
                continue
            for remark in CONVERSIONS[self.makes].remarks(converted):
                work.count(remark, row_id)
            work.progress.done += 1
            work.counts["characters"] += _characters(converted)
            yield {"id": row_id, **converted}

    def _exclusions(self) -> list[str]:
        """Returns the rules of `exclude`."""
        return [f"{column} is {v}" for column, values in self.exclude.items() for v in values]

    def _exclusion(self, raw: Row) -> str | None:
        """Returns the rule of `exclude` that drops a row, or None."""
        for column, values in self.exclude.items():
            value = raw.get(column)
            for v in value if isinstance(value, list) else [value]:
                if str(v) in values:  # a column may hold numbers
                    return f"{column} is {v}"
        return None

    def _convert(self, row: Row) -> Row:
        """Returns our row from a renamed one. Raises Unreadable if it cannot be used."""
        converted = CONVERSIONS[self.makes].convert(row)
        if self.ties == "drop" and (rule := disagreement(converted)):
            raise Unreadable(rule)
        return converted

    def _raw(self, work: Work) -> Iterator[Row]:
        if self.files:
            for path in data_files(work.files["files"], self.split):
                if path.suffix in (".json", ".jsonl"):
                    yield from (row for _, row in located_rows(path))
                else:
                    yield from stream(str(path), FORMATS[path.suffix], str(path))
            return
        dataset = self.dataset or ""
        source = f"dataset {dataset!r} (split {self.split!r})"
        if "://" in dataset:
            if (loader := FORMATS.get(Path(dataset).suffix)) is None:
                raise Permanent(
                    f"{source}: unknown file format; use files that end in {' or '.join(FORMATS)}"
                )
            rows = stream(dataset, loader, source)
        else:
            rows = stream(None, dataset, source, split=self.split, revision=self.revision)
        first, rows = tee(rows)
        unusable = Unusable()
        if not self._has_usable(source, first, unusable):
            unusable.refuse(source)
        del first  # otherwise tee would keep all rows for it
        yield from rows

    def _name(self, column: str, present: Collection[str]) -> str:
        """Returns the name that our column has in the data."""
        if column in self.columns:
            return self.columns[column]
        names = NAMES.get(column, (column,))
        return next((name for name in names if name in present), names[0])

    def _renamed(self, raw: Row) -> Row:
        """Returns the columns that a row has, under our names. A needed column is never missing,
        but may be None."""
        conversion = CONVERSIONS[self.makes]
        names = {column: self._name(column, raw) for column in conversion.columns}
        row = {column: raw[name] for column, name in names.items() if name in raw}
        return dict.fromkeys(conversion.needed) | row

    def _has_usable(self, source: Any, rows: Iterable[Row], unusable: Unusable) -> bool:
        """Returns whether one of the first rows is usable, and adds those before it to
        `unusable`. Raises Permanent if none of them has all columns."""
        lacks: Counter[str] = Counter()
        present: dict[str, None] = {}
        has_columns = False
        for number, raw in enumerate(islice(rows, FIRST), 1):
            if missing := self._missing(raw):
                lacks.update(missing)
                present |= dict.fromkeys(raw)
                continue
            has_columns, row = True, self._renamed(raw)
            try:
                self._convert(row)
                self._check_exclude(source, raw)
                return True
            except Unreadable as reason:
                if any(value is not None for value in raw.values()):
                    file = f" of {source.name}" if isinstance(source, Path) else ""
                    unusable.add(reason, f"row {number}{file}", row.get("id"))
        if has_columns or not lacks:
            return False
        column = max(lacks, key=lacks.__getitem__)
        name, has = self._name(column, present), ", ".join(sorted(present))
        if column in SCORES and self.ties == "drop":
            raise Permanent(
                f"{source} has no column '{name}', and ties: drop needs score_chosen and "
                f"score_rejected; it has {has}; name the scores with columns: "
                "{score_chosen: …, score_rejected: …}, or remove ties:"
            )
        fix = f"name another with columns: {{{column}: …}}"
        for makes in ("pairs", "feedback"):
            other = CONVERSIONS[makes]
            has_all = all(self._name(c, present) in present for c in other.needed)
            if has_all and other is not CONVERSIONS[self.makes]:
                fix = f"set makes: {makes}, or {fix}"
        raise Permanent(
            f"{source} has no column '{name}', which {self.makes} need; it has {has}; {fix}"
        )

    def _check_exclude(self, source: Any, raw: Row) -> None:
        if missing := sorted(set(self.exclude) - set(raw)):
            raise Permanent(
                f"exclude: {source} has no column '{missing[0]}'; it has {', '.join(sorted(raw))}; "
                "name one of them"
            )

    def _missing(self, row: Row) -> list[str]:
        """Returns the needed columns that a row lacks."""
        conversion = CONVERSIONS[self.makes]
        optional = {*self.columns, *(SCORES if self.ties == "drop" else ())}
        needed = [*conversion.needed, *(c for c in conversion.optional if c in optional)]
        if missing := [column for column in needed if self._name(column, row) not in row]:
            return missing
        try:
            conversion.convert(self._renamed(row))
        except Unreadable as error:
            return [error.column] if error.column else []
        return []


SIZES: dict[tuple[str, str], tuple[int, int | None]] = {
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): (207_865, 285_000_000),
    ("HuggingFaceH4/ultrachat_200k", "test_sft"): (23_110, None),
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): (61_135, None),
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): (2_000, None),
    ("openbmb/UltraFeedback", "train"): (63_967, None),
}
"""Number of rows and, if known, of tokens (by Mistral's tokenizer) in the data sets that Zephyr was
trained on, for planning."""


def _characters(row: Row) -> int:
    conversations = [row.get(name) or [] for name in ("messages", "chosen", "rejected")]
    answers = sum(len(answer["text"]) for answer in row.get("completions", []))
    return answers + sum(len(m["content"]) for messages in conversations for m in messages)
