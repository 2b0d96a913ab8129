"""Streams published data as dialogues, pairs or prompts, from a hub data set or from local files.

The columns of UltraChat-200k (`prompt_id, messages`) and of UltraFeedback-binarized (`prompt,
prompt_id, chosen, rejected, score_chosen, score_rejected`) need no mapping. Unusable rows are
counted by reason.
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
"""The column of published data sets that holds our `id`."""

Row = dict[str, Any]


class Published(Stage):
    """A stage that reads rows from `dataset` (a hub id, or an address such as
    s3://bucket/folder/*.parquet) or from `files` (a file or a folder of Parquet, JSONL or Arrow
    files)."""

    kind = "published"

    makes: Literal["dialogues", "pairs", "prompts"]  # type: ignore[misc]
    dataset: str | None = None
    files: Annotated[str | None, FILE] = None
    split: str = "train"
    """A split of the hub data set. In a folder, files with this prefix (train.jsonl,
    train-00000-of-00003.parquet), or all files if no file name mentions a split."""
    revision: str | None = None
    """A branch, tag or commit of the hub data set."""
    columns: dict[str, str] = {}
    """Names of columns in the data, by our names."""
    limit: int | None = Field(None, ge=1)
    """Maximum usable rows, from the start of the data."""

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if (self.dataset is None) == (self.files is None):
            raise Permanent("dataset: and files: are both set or both missing; set one of them")
        columns = NEEDED[self.makes] + OPTIONAL[self.makes]
        if unknown := sorted(set(self.columns) - set(columns)):
            raise Permanent(
                f"columns: '{unknown[0]}' is no column of {self.makes}; choose from "
                f"{', '.join(columns)}"
            )
        if self.files:
            for path in data_files(files["files"], self.split):
                self._check_columns(path, _columns(path))

    def expected(self, rows: dict[str, int]) -> int | None:
        size = SIZES.get((self.dataset or "", self.split), (None,))[0]
        return min(self.limit, size) if self.limit and size else self.limit or size

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        """Returns the published mean, if it is known."""
        rows, tokens = SIZES.get((self.dataset or "", self.split), (0, None))
        return tokens / rows if tokens else None

    def run(self, work: Work) -> None:
        converters: dict[str, Callable[[Row], Row]] = {
            "dialogues": _to_dialogue,
            "pairs": _to_pair,
            "prompts": _to_prompt,
        }
        work.counts["characters"] = 0
        work.progress.total = self.expected({}) or 0
        work.write_rows(islice(self._usable(work, converters[self.makes]), self.limit))
        if not work.counts["rows"]:
            reasons = {k: n for k, n in work.counts.items() if k.startswith("dropped/")}
            raise Permanent(
                f"stage '{work.name}': no usable row: {reasons or 'no rows at all'}; "
                "correct columns: or split:"
            )

    def _usable(self, work: Work, convert: Callable[[Row], Row]) -> Iterator[Row]:
        names = {c: self._name(c) for c in NEEDED[self.makes] + OPTIONAL[self.makes]}
        for number, raw in enumerate(self._raw(work)):
            row = {ours: raw.get(theirs) for ours, theirs in names.items()}
            # Published ids may repeat; the row number makes them unique.
            row_id = f"r{number:07d}" if row.get("id") is None else f"{row['id']}/{number}"
            try:
                converted = convert(row)
            except _Unusable as reason:
                work.drop(str(reason), row_id)
                continue
            work.progress.done += 1
            work.counts["characters"] += _characters(converted)
            yield {"id": row_id, **converted}

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
                raise Permanent(f"{source}: the address must end in {', '.join(FORMATS)}")
            rows = _stream(dataset, loader, source)
        else:
            rows = _stream(None, dataset, source, split=self.split, revision=self.revision)
        first = next(rows, None)
        if first is not None:
            self._check_columns(source, set(first))
            yield first
        yield from rows

    def _name(self, column: str) -> str:
        return self.columns.get(column, ID if column == "id" else column)

    def _check_columns(self, source: Any, present: set[str]) -> None:
        required = NEEDED[self.makes] + [c for c in OPTIONAL[self.makes] if c in self.columns]
        missing = [self._name(column) for column in required if self._name(column) not in present]
        if missing:
            raise Permanent(
                f"{source} has no column '{missing[0]}', which {self.makes} need; it has "
                f"{', '.join(sorted(present))}; name another with columns: "
                f"{{{next(c for c in required if self._name(c) == missing[0])}: …}}"
            )


SIZES: dict[tuple[str, str], tuple[int, int | None]] = {
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): (207_865, 285_000_000),
    ("HuggingFaceH4/ultrachat_200k", "test_sft"): (23_110, None),
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): (61_135, None),
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): (2_000, None),
}
"""Published rows and, if known, tokens (Mistral's tokenizer) of the data sets that Zephyr was
trained on, for planning."""


SPLIT_WORDS = re.compile("train|test|valid|eval|dev")
"""Matches file names that mention a split."""


class _Unusable(Exception):
    """The reason why a row cannot be used."""


def data_files(path: Path, split: str) -> list[Path]:
    """Returns the data files of `files:`, sorted by name. Raises Permanent if there are none, none
    of the split, or several formats."""
    if path.is_file() and path.suffix in FORMATS:
        return [path]
    matches = (p for p in path.rglob("*") if p.is_file() and p.suffix in FORMATS)
    files = sorted(p for p in matches if not re.search(r"(^|/)\.", str(p.relative_to(path))))
    if not files:
        raise Permanent(f"{path} has no {', '.join(FORMATS)} file; correct files:")
    of_split = [p for p in files if re.match(rf"{re.escape(split)}[-.]", p.name)]
    if not of_split and (split != "train" or any(SPLIT_WORDS.search(p.name) for p in files)):
        raise Permanent(
            f"{path} has no file of split '{split}' but {', '.join(p.name for p in files[:5])}; "
            "set split: to the part of the wanted names before the first - or ."
        )
    files = of_split or files
    if len(formats := sorted({p.suffix for p in files})) > 1:
        raise Permanent(f"{path} has files of {' and '.join(formats)}; keep one format per folder")
    return files


def _columns(path: Path) -> set[str]:
    """Returns the names of a file's columns without reading its rows."""
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
        raise Permanent(
            f"{path} is no {path.suffix[1:]} file, or truncated: {error}; copy it again"
        ) from None


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
        raise Permanent(f"cannot read {source}: {reason}; correct the path or address") from error


def _conversation(value: Any) -> list[Message]:
    """Returns the messages of a conversation that alternates from user to assistant. Raises
    _Unusable if it does not."""
    if not isinstance(value, list) or not value:
        raise _Unusable("no messages")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, dict):
            raise _Unusable("no messages")
        role, text = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise _Unusable("unknown role")
        if not isinstance(text, str) or not text.strip():
            if role == "system" and not messages:
                continue  # published data sets write an empty system message for none
            raise _Unusable("empty message")
        messages.append({"role": role, "content": text})
    roles = [m["role"] for m in messages[messages[0]["role"] == "system" :]] if messages else []
    if roles[1::2] != ["assistant"] * (len(roles) // 2) or roles[::2] != ["user"] * len(roles[::2]):
        raise _Unusable("roles do not alternate")
    if not roles or len(roles) % 2:
        raise _Unusable("no answer at the end")
    return messages


def _to_dialogue(row: Row) -> Row:
    messages = _conversation(row["messages"])
    prompt = next(m["content"] for m in messages if m["role"] == "user")
    return {"prompt": prompt, "instruction": prompt, "constraint": None, "messages": messages}


def _to_pair(row: Row) -> Row:
    prompt = _text(row["prompt"])
    # An answer may be a text or a complete conversation.
    chosen, rejected = (
        [user(prompt), assistant(side)] if isinstance(side, str) and side.strip() else side
        for side in (row["chosen"], row["rejected"])
    )
    chosen, rejected = _conversation(chosen), _conversation(rejected)
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


def _to_prompt(row: Row) -> Row:
    prompt = _text(row["prompt"])
    return {"instruction": prompt, "constraint": None, "prompt": prompt, "source": "published"}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Unusable("empty prompt")
    return value


def _characters(row: Row) -> int:
    conversations = [row.get(name) or [] for name in ("messages", "chosen", "rejected")]
    return sum(len(m["content"]) for messages in conversations for m in messages)
