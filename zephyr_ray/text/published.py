"""Streams published data as dialogues, pairs or prompts, from a hub data set or from local files.

The columns of UltraChat-200k (`prompt_id, messages`) and of UltraFeedback-binarized (`prompt,
prompt_id, chosen, rejected, score_chosen, score_rejected`) need no mapping. Conversations may have
any form that `conversations.py` reads. Unusable rows are counted by reason.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice, tee
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from zephyr_ray.conversations import Unreadable
from zephyr_ray.errors import Permanent
from zephyr_ray.published_rows import CONVERSIONS, SCORE_RULES, Row, Unusable, disagreement
from zephyr_ray.settings import ADDED, FILE
from zephyr_ray.stage import BoundedStage, Stage, Work
from zephyr_ray.store import numbered_jsonl

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".arrow": "arrow"}
NAMES = {"id": ("prompt_id",), "messages": ("messages", "conversations")}
"""Column names in published data sets, if they differ from ours; the first one present is read."""
SCORES = ("score_chosen", "score_rejected")
FIRST = 1000
"""Maximum rows searched for a usable one before the data is refused."""


class Published(BoundedStage):
    """A stage that reads rows from `dataset` (a hub id, or an address such as
    s3://bucket/folder/*.parquet) or from `files` (a file or a folder of Parquet, JSONL or Arrow
    files)."""

    kind = "published"

    makes: Literal["dialogues", "pairs", "prompts"]  # type: ignore[misc]
    dataset: str | None = None
    files: Annotated[str | None, FILE] = None
    split: str = "train"
    """A split of the hub data set. In a folder, files with this prefix (train.jsonl,
    train-00000-of-00003.parquet); for train, all files if no file name mentions a split."""
    revision: str | None = None
    """A branch, tag or commit of the hub data set."""
    columns: dict[str, str] = {}
    """Column names in the data, by our names for them."""
    limit: int | None = Field(None, ge=1)
    """Maximum usable rows, from the start of the data."""
    ties: Annotated[Literal["keep", "drop"], ADDED] = "keep"
    """Treatment of pairs whose scores tie or contradict the choice; they are counted."""

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
            raise Permanent(f"ties: {self.makes} have no scores; remove ties:")
        if self.files:
            paths = data_files(files["files"], self.split)
            unusable = Unusable()
            usable = [self._has_usable(path, _first_rows(path), unusable) for path in paths]
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
        work.progress.total = self.expected({}) or 0
        work.write_rows(islice(self._usable(work), self.limit))
        if not work.counts["rows"]:
            raise Permanent(
                f"stage '{work.name}': the data has no rows, or only empty ones; change the files "
                "or split setting"
            )
        dropped = sum(n for rule, n in work.counts.items() if rule.startswith("dropped/"))
        work.check_dropped(int(work.counts["rows"] + dropped), sound=SCORE_RULES)

    def _usable(self, work: Work) -> Iterator[Row]:
        for number, raw in enumerate(self._raw(work)):
            row = self._renamed(raw)
            # Published ids may repeat; the row number makes them unique.
            row_id = f"r{number:07d}" if row.get("id") is None else f"{row['id']}/{number}"
            try:
                converted = self._convert(row)
            except Unreadable as reason:
                work.drop(str(reason), row_id)
                continue
            if rule := disagreement(converted):
                work.counts[rule] = work.counts.get(rule, 0) + 1
            work.progress.done += 1
            work.counts["characters"] += _characters(converted)
            yield {"id": row_id, **converted}

    def _convert(self, row: Row) -> Row:
        """Returns our row from a renamed one. Raises Unreadable if it cannot be used."""
        converted = CONVERSIONS[self.makes].convert(row)
        if self.ties == "drop" and (rule := disagreement(converted)):
            raise Unreadable(rule)
        return converted

    def _raw(self, work: Work) -> Iterator[Row]:
        if self.files:
            for path in data_files(work.files["files"], self.split):
                if path.suffix == ".jsonl":
                    yield from (row for _, row in numbered_jsonl(path))
                else:
                    yield from _stream(str(path), FORMATS[path.suffix], str(path))
            return
        dataset = self.dataset or ""
        source = f"dataset {dataset!r} (split {self.split!r})"
        if "://" in dataset:
            if (loader := FORMATS.get(Path(dataset).suffix)) is None:
                raise Permanent(
                    f"{source}: unknown file format; use files that end in {' or '.join(FORMATS)}"
                )
            rows = _stream(dataset, loader, source)
        else:
            rows = _stream(None, dataset, source, split=self.split, revision=self.revision)
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
        raise Permanent(
            f"{source} has no column '{name}', which {self.makes} need; it has {has}; name another "
            f"with columns: {{{column}: …}}"
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
}
"""Number of rows and, if known, of tokens (by Mistral's tokenizer) in the data sets that Zephyr was
trained on, for planning."""


SPLIT_WORDS = re.compile("train|test|valid|eval|dev")
"""Matches file names that mention a split."""


def data_files(path: Path, split: str) -> list[Path]:
    """Returns the data files of `files:`, sorted by name. Raises Permanent if there are none, none
    of the split, or several formats."""
    if path.is_file() and path.suffix in FORMATS:
        return [path]
    if path.is_file():
        raise Permanent(
            f"{path} has another format; convert it to JSONL (an object per line), Parquet or Arrow"
        )
    matches = (p for p in path.rglob("*") if p.is_file() and p.suffix in FORMATS)
    files = sorted(p for p in matches if not re.search(r"(^|/)\.", str(p.relative_to(path))))
    if not files:
        raise Permanent(f"{path} has no {' or '.join(FORMATS)} file; change the files setting")
    split_files = [p for p in files if re.match(rf"{re.escape(split)}[-.]", p.name)]
    if not split_files and (split != "train" or any(SPLIT_WORDS.search(p.name) for p in files)):
        raise Permanent(
            f"{path} has no file of split '{split}'; it has "
            f"{', '.join(p.name for p in files[:5])}; set split to the part of a file name before "
            "the first - or ."
        )
    files = split_files or files
    if len(formats := sorted({p.suffix for p in files})) > 1:
        raise Permanent(f"{path} has {' and '.join(formats)} files; keep one format per folder")
    return files


def _first_rows(path: Path) -> Iterable[Row]:
    """Returns the first rows of a file; in a file without rows, every column is None. Raises
    Permanent if a JSONL file has no rows, because then its columns are unknown."""
    if path.suffix == ".jsonl":
        lines = (row for _, row in numbered_jsonl(path))
        if (first := next(lines, None)) is None:
            raise Permanent(f"{path} has no rows; change the files setting")
        return chain([first], lines)
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as source:
                return _first(source.schema_arrow.names, source.iter_batches(batch_size=FIRST))
        with pa.memory_map(str(path)) as file:
            try:
                stream = pa.ipc.open_stream(file)
                return _first(stream.schema.names, stream)
            except pa.ArrowInvalid:
                blocks = pa.ipc.open_file(file)
                numbers = range(blocks.num_record_batches)
                return _first(blocks.schema.names, map(blocks.get_batch, numbers))
    except (pa.ArrowInvalid, OSError) as error:
        raise Permanent(
            f"{path} is not a valid {path.suffix[1:]} file, or is truncated: {error}; copy it again"
        ) from None


def _first(names: list[str], batches: Iterable[Any]) -> list[Row]:
    rows = (row for batch in batches for row in batch.slice(0, FIRST).to_pylist())
    return list(islice(rows, FIRST)) or [dict.fromkeys(names)]


def _stream(files: str | None, loader: str, source: str, **options: Any) -> Iterator[Row]:
    """Yields rows one by one, with a few hundred in memory. Raises Permanent if the loader
    fails."""
    from datasets import load_dataset

    if files:
        options = {"data_files": files, "split": "train"}
    try:
        yield from load_dataset(loader, streaming=True, **options)
    except Exception as error:  # no network, no such data set or split, a truncated file, …
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fix = "path or address" if files else "name or the network, or set files: to a local copy"
        raise Permanent(f"cannot read {source}: {reason}; correct the {fix}") from error


def _characters(row: Row) -> int:
    conversations = [row.get(name) or [] for name in ("messages", "chosen", "rejected")]
    return sum(len(m["content"]) for messages in conversations for m in messages)
