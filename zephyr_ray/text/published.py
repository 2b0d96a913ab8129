"""Published data as dialogues, pairs or prompts: a set of the hub, or files of your own, streamed.

The columns of UltraChat-200k (`prompt_id, messages`) and of UltraFeedback-binarized (`prompt,
prompt_id, chosen, rejected, score_chosen, score_rejected`) need no mapping. Of a row that cannot be
used the reason is counted.
"""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.messages import Message, assistant, user
from zephyr_ray.settings import FILE
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import numbered_jsonl

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".arrow": "arrow"}
NEEDED = {
    "dialogues": ["messages"],
    "pairs": ["prompt", "chosen", "rejected"],
    "prompts": ["prompt"],
}
OPTIONAL = {
    "dialogues": ["id"],
    "pairs": ["id", "score_chosen", "score_rejected"],
    "prompts": ["id"],
}
ID = "prompt_id"
"""The published sets' name of our `id`."""

Row = dict[str, Any]


class Published(Stage):
    """Rows of `dataset` (a hub id, or an address such as s3://bucket/folder/*.parquet) or of
    `files` (a file or a folder of Parquet, JSONL or Arrow files)."""

    kind = "published"

    makes: Literal["dialogues", "pairs", "prompts"]  # type: ignore[misc]
    dataset: str | None = None
    files: Annotated[str | None, FILE] = None
    split: str = "train"
    """Of a hub set, its name there; of a folder, the files of that name: train.jsonl,
    train-00000-of-00003.parquet. Where no name speaks of a split, all of them."""
    revision: str | None = None
    """A branch, tag or commit of a hub set."""
    columns: dict[str, str] = {}
    """Our name of a column: the name it has there."""
    limit: int | None = Field(None, ge=1)
    """Rows kept at most, from the start."""

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if (self.dataset is None) == (self.files is None):
            raise Permanent("give dataset: (a hub id or an address) or files: (a file or a folder)")
        known = NEEDED[self.makes] + OPTIONAL[self.makes]
        if unknown := sorted(set(self.columns) - set(known)):
            raise Permanent(
                f"columns: '{unknown[0]}' is no column of {self.makes}: {', '.join(known)}"
            )
        if self.files:
            for path in data_files(files["files"], self.split):
                self._check_columns(path, _columns(path))

    def expected(self, rows: dict[str, int]) -> int | None:
        size = SIZES.get((self.dataset or "", self.split), (None,))[0]
        return min(self.limit, size) if self.limit and size else self.limit or size

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        """Returns the published mean, if there is one."""
        rows, tokens = SIZES.get((self.dataset or "", self.split), (0, None))
        return tokens / rows if tokens else None

    def run(self, work: Work) -> None:
        read: dict[str, Callable[[Row], Row]] = {
            "dialogues": _dialogue,
            "pairs": _pair,
            "prompts": _prompt,
        }
        work.counts["characters"] = 0
        work.progress.total = self.expected({}) or 0
        work.write_rows(islice(self._usable(work, read[self.makes]), self.limit))
        if not work.counts["rows"]:
            reasons = {k: n for k, n in work.counts.items() if k.startswith("dropped/")}
            raise Permanent(
                f"stage '{work.name}': no row can be used: {reasons or 'no rows at all'}"
            )

    def _usable(self, work: Work, read: Callable[[Row], Row]) -> Iterator[Row]:
        names = {c: self._name(c) for c in NEEDED[self.makes] + OPTIONAL[self.makes]}
        for number, raw in enumerate(self._raw(work)):
            row = {ours: raw.get(theirs) for ours, theirs in names.items()}
            # A published id may stand at several rows; the place tells them apart.
            row_id = f"r{number:07d}" if row.get("id") is None else f"{row['id']}/{number}"
            try:
                made = read(row)
            except _Unusable as reason:
                work.drop(str(reason), row_id)
                continue
            work.progress.done += 1
            work.counts["characters"] += _characters(made)
            yield {"id": row_id, **made}

    def _raw(self, work: Work) -> Iterator[Row]:
        if self.files:
            for path in data_files(work.files["files"], self.split):
                if path.suffix == ".jsonl":
                    yield from (row for _, row in numbered_jsonl(path))
                else:
                    yield from _stream(str(path), FORMATS[path.suffix], str(path))
            return
        dataset = self.dataset or ""
        where = f"dataset {dataset!r} (split {self.split!r})"
        if "://" in dataset:
            if (found := FORMATS.get(Path(dataset).suffix)) is None:
                raise Permanent(f"{where}: the address must end in {', '.join(FORMATS)}")
            rows = _stream(dataset, found, where)
        else:
            rows = _stream(None, dataset, where, split=self.split, revision=self.revision)
        first = next(rows, None)
        if first is not None:
            self._check_columns(where, set(first))
            yield first
        yield from rows

    def _name(self, column: str) -> str:
        return self.columns.get(column, ID if column == "id" else column)

    def _check_columns(self, where: Any, found: set[str]) -> None:
        wanted = NEEDED[self.makes] + [c for c in OPTIONAL[self.makes] if c in self.columns]
        missing = [self._name(column) for column in wanted if self._name(column) not in found]
        if missing:
            raise Permanent(
                f"{where} has no column '{missing[0]}', which {self.makes} need; it has "
                f"{', '.join(sorted(found))}; name another with columns: "
                f"{{{next(c for c in wanted if self._name(c) == missing[0])}: …}}"
            )


SIZES: dict[tuple[str, str], tuple[int, int | None]] = {
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): (207_865, 285_000_000),
    ("HuggingFaceH4/ultrachat_200k", "test_sft"): (23_110, None),
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): (61_135, None),
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): (2_000, None),
}
"""Rows, and tokens of Mistral's tokenizer where they are known, of the sets that Zephyr was trained
on, as published: for planning."""


SPLIT_WORDS = re.compile("train|test|valid|eval|dev")
"""A file of such a name is not for everybody."""


class _Unusable(Exception):
    """Why a row is left out."""


def data_files(path: Path, split: str) -> list[Path]:
    """The data files behind `files:`, in the order of their names: all of one format."""
    if path.is_file() and path.suffix in FORMATS:
        return [path]
    every = (p for p in path.rglob("*") if p.is_file() and p.suffix in FORMATS)
    found = sorted(p for p in every if not re.search(r"(^|/)\.", str(p.relative_to(path))))
    if not found:
        raise Permanent(f"{path} has no {', '.join(FORMATS)} file")
    of_split = [p for p in found if re.match(rf"{re.escape(split)}[-.]", p.name)]
    if not of_split and (split != "train" or any(SPLIT_WORDS.search(p.name) for p in found)):
        raise Permanent(
            f"{path} has no file of split '{split}' but {', '.join(p.name for p in found[:5])}: "
            "set split: to what stands before the first - or . of the names you want"
        )
    found = of_split or found
    if len(kinds := sorted({p.suffix for p in found})) > 1:
        raise Permanent(f"{path} has files of {' and '.join(kinds)}; keep one format in a folder")
    return found


def _columns(path: Path) -> set[str]:
    """Names of a file's columns, without reading its rows."""
    if path.suffix == ".jsonl":
        return set(next(numbered_jsonl(path), (0, {}))[1])
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            return set(parquet.read_schema(path).names)
        with pa.memory_map(str(path)) as file:
            try:
                return set(pa.ipc.open_stream(file).schema.names)
            except pa.ArrowInvalid:
                return set(pa.ipc.open_file(file).schema.names)
    except (pa.ArrowInvalid, OSError) as error:
        raise Permanent(f"{path} is no {path.suffix[1:]} file, or cut short: {error}") from None


def _stream(files: str | None, loader: str, where: str, **options: Any) -> Iterator[Row]:
    """Rows one after the other, some hundred in memory; what the loader cannot do is Permanent."""
    from datasets import load_dataset

    if files:
        options = {"data_files": files, "split": "train"}
    try:
        yield from load_dataset(loader, streaming=True, **options)
    except Exception as error:  # no route, no such set, no such split, a file that is cut short, …
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Permanent(f"{where} cannot be read: {said}") from error


def _talk(value: Any) -> list[Message]:
    """The messages of a conversation that alternates, from a user to an assistant."""
    if not isinstance(value, list) or not value:
        raise _Unusable("no messages")
    talk: list[Message] = []
    for message in value:
        if not isinstance(message, dict):
            raise _Unusable("no messages")
        role, text = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise _Unusable("unknown role")
        if not isinstance(text, str) or not text.strip():
            if role == "system" and not talk:
                continue  # the published sets write an empty system message for none
            raise _Unusable("empty message")
        talk.append({"role": role, "content": text})
    turns = [m["role"] for m in talk[talk[0]["role"] == "system" :]] if talk else []
    if turns[1::2] != ["assistant"] * (len(turns) // 2) or turns[::2] != ["user"] * len(turns[::2]):
        raise _Unusable("roles do not alternate")
    if not turns or len(turns) % 2:
        raise _Unusable("no answer at the end")
    return talk


def _dialogue(row: Row) -> Row:
    talk = _talk(row["messages"])
    prompt = next(m["content"] for m in talk if m["role"] == "user")
    return {"prompt": prompt, "instruction": prompt, "constraint": None, "messages": talk}


def _pair(row: Row) -> Row:
    prompt = _text(row["prompt"])
    # An answer may be a text, or the whole conversation.
    chosen, rejected = (
        [user(prompt), assistant(side)] if isinstance(side, str) and side.strip() else side
        for side in (row["chosen"], row["rejected"])
    )
    chosen, rejected = _talk(chosen), _talk(rejected)
    if chosen[:-1] != rejected[:-1]:
        raise _Unusable("chosen and rejected answer different prompts")
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise _Unusable("chosen is rejected")
    scores = {name: row[name] for name in ("score_chosen", "score_rejected")}
    return {
        "prompt": prompt,
        "instruction": prompt,
        "constraint": None,
        "chosen": chosen,
        "rejected": rejected,
        **scores,
    }


def _prompt(row: Row) -> Row:
    prompt = _text(row["prompt"])
    return {"instruction": prompt, "constraint": None, "prompt": prompt, "source": "published"}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Unusable("empty prompt")
    return value


def _characters(row: Row) -> int:
    talks = [row.get(name) or [] for name in ("messages", "chosen", "rejected")]
    return sum(len(m["content"]) for talk in talks for m in talk)
