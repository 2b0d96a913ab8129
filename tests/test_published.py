"""Tests that published data sets in their own schemas become rows that sft and dpo read."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import train_once

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.preflight import check_files
from zephyr_ray.published_files import data_files
from zephyr_ray.published_rows import FIXES
from zephyr_ray.recipe import load
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, Store, read_jsonl
from zephyr_ray.text.published import Published
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

Row = dict[str, Any]


def conversation(*turns: str, first: str = "user") -> list[dict[str, str]]:
    roles = [first, "assistant" if first == "user" else "user"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


def ultrachat(number: int, messages: Any = None) -> Row:
    messages = conversation("Hi?", "Hello.", "More?", "No.") if messages is None else messages
    return {"prompt": "Hi?", "prompt_id": f"p{number}", "messages": messages}


def ultrafeedback(number: int, good: str = "Yes.", bad: str = "Maybe.", ask: str = "So?") -> Row:
    return {
        "prompt": "So?",
        "prompt_id": f"p{number}",
        "chosen": conversation("So?", good),
        "rejected": conversation(ask, bad),
        "messages": conversation("So?", good),
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    }


def write_parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_arrow(path: Path, rows: list[Row]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path.with_suffix(""))  # a folder of data-….arrow
    assert list(path.with_suffix("").glob("*.arrow"))


def write_arrow_file(path: Path, rows: list[Row]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "a.arrow": write_arrow,
    "b.arrow": write_arrow_file,
}


def run_published(files: Path, **settings: Any) -> tuple[list[Row], Work]:
    stage = Published(files=str(files), **settings)
    stage.check({"files": files}, {})
    folder = files.parent / f"{files.name}-artifact"
    work = Work("published", folder, 0, {}, {}, {"files": files})
    work.scratch.mkdir(parents=True, exist_ok=True)
    stage.run(work)
    return Artifact(folder, Manifest(kind="text", key="k", files={})).rows(), work


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.mark.parametrize("name", WRITERS)
def test_ultrachat_rows_are_what_sft_reads(name: str, folder: Path, tiny_model: Path) -> None:
    WRITERS[name](folder / name, [ultrachat(n) for n in range(3)])
    rows, work = run_published(folder, makes="dialogues")
    assert [row["id"] for row in rows] == ["p0/0", "p1/1", "p2/2"]
    assert rows[0]["messages"] == conversation("Hi?", "Hello.", "More?", "No.")
    assert work.counts == {"characters": 3 * 17, "rows": 3}
    chat = load_chat(tiny_model)
    stage = Sft(model="base", data="data", packing=False)
    training = train_once.work_for(folder.parent / "sft", tiny_model, rows)
    [first, *_] = stage.prepare(training)
    assert [label for label in first["labels"] if label == chat.stop_token_id] == [
        chat.stop_token_id
    ] * 2


@pytest.mark.parametrize("name", WRITERS)
def test_ultrafeedback_rows_are_what_dpo_reads(name: str, folder: Path, tiny_model: Path) -> None:
    WRITERS[name](folder / name, [ultrafeedback(n) for n in range(2)])
    rows, _ = run_published(folder, makes="pairs")
    assert rows[1]["chosen"] == conversation("So?", "Yes.")
    assert rows[1]["rejected"] == conversation("So?", "Maybe.")
    assert (rows[1]["score_chosen"], rows[1]["score_rejected"]) == (8.0, 3.5)
    training = train_once.work_for(folder.parent / "dpo", tiny_model, rows)
    chat = load_chat(tiny_model)
    [pair, _] = Dpo(model="base", data="data").prepare(training)
    assert pair["prompt_ids"] == chat.prompt(conversation("So?"))
    texts = [chat.tokenizer.decode(pair[f"{side}_ids"]) for side in ("chosen", "rejected")]
    assert texts == ["Yes.<|im_end|>", "Maybe.<|im_end|>"]


def load_chat(folder: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat.of(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (conversation("Hi?", " "), "empty assistant message"),
        (conversation("Hi?", "Hello.", "More?"), "no answer at the end"),
        (conversation("Hello.", "Hi?", first="assistant"), "starts with an assistant message"),
        (
            [*conversation("Hi?"), *conversation("Hi?"), *conversation("a", first="assistant")],
            "roles do not alternate",
        ),
        ([{"role": "tool", "content": "x"}, *conversation("Hi?", "a")], "a tool turn"),
        ([{"role": "narrator", "content": "x"}, *conversation("Hi?", "a")], "unknown role"),
        ([{"role": "system", "content": "Be brief."}], "no answer at the end"),
    ],
)
def test_a_bad_dialogue_is_counted_and_dropped(
    messages: list[dict[str, str]], reason: str, folder: Path
) -> None:
    assert reason in FIXES
    write_jsonl(folder / "a.jsonl", [ultrachat(0, messages), ultrachat(1)])
    rows, work = run_published(folder, makes="dialogues")
    assert [row["id"] for row in rows] == ["p1/1"]
    assert work.counts[f"dropped/{reason}"] == 1
    assert work.examples[f"dropped/{reason}"] == ["p0/0"]


def test_a_system_message_is_kept_and_an_empty_one_removed(folder: Path) -> None:
    systems = [[{"role": "system", "content": text}] for text in ("Be brief.", "")]
    write_jsonl(
        folder / "a.jsonl",
        [ultrachat(n, s + conversation("a", "b")) for n, s in enumerate(systems)],
    )
    rows, _ = run_published(folder, makes="dialogues")
    assert [len(row["messages"]) for row in rows] == [3, 2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ultrafeedback(0, bad=" Yes. "), "chosen and rejected are the same"),
        (ultrafeedback(0, ask="What?"), "chosen and rejected answer different prompts"),
        (ultrafeedback(0, bad=""), "empty assistant message"),
        ({**ultrafeedback(0), "prompt": None}, "empty prompt"),
        ({**ultrafeedback(0), "chosen": None}, "no messages"),
    ],
)
def test_a_bad_pair_is_counted_and_dropped(row: Row, reason: str, folder: Path) -> None:
    assert reason in FIXES
    write_jsonl(folder / "a.jsonl", [row, ultrafeedback(1)])
    rows, work = run_published(folder, makes="pairs")
    assert len(rows) == 1 and work.counts[f"dropped/{reason}"] == 1


@pytest.mark.parametrize("score", [10**19, "1e19", 1e19])
def test_a_score_of_more_than_64_bits_is_stored_as_a_float(score: Any, folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [{**ultrafeedback(0), "score_chosen": score}])
    [row], _ = run_published(folder, makes="pairs")
    assert isinstance(row["score_chosen"], float) and row["score_chosen"] == 1e19


@pytest.mark.parametrize("score", ["NaN", "-Infinity", "1e308", "1" + "0" * 400])
def test_a_score_that_is_not_finite_or_too_large_to_sum_is_none(score: str, folder: Path) -> None:
    row = json.dumps({**ultrafeedback(0), "score_chosen": "SCORE"}).replace('"SCORE"', score)
    (folder / "a.jsonl").write_text(row + "\n")
    [read], _ = run_published(folder, makes="pairs")
    assert read["score_chosen"] is None and read["score_rejected"] == 3.5


def test_unusable_rows_have_a_limit(folder: Path) -> None:
    rows = [ultrachat(0, [{"role": "ai", "content": "x"}, *conversation("a", "b")])] * 2
    write_jsonl(folder / "a.jsonl", [*rows, *map(ultrachat, range(1, 19))])
    with pytest.raises(Permanent, match=r"2 of 20 rows were dropped \(10%: unknown role.* 2\)"):
        run_published(folder, makes="dialogues")


def test_pairs_dropped_for_their_scores_have_no_limit(folder: Path) -> None:
    rows = [ultrafeedback(n) for n in range(4)]
    scores = {"score_chosen": 5.0, "score_rejected": 5.0}
    write_jsonl(
        folder / "a.jsonl", [{**row, **(scores if n else {})} for n, row in enumerate(rows)]
    )
    kept, work = run_published(folder, makes="pairs", ties="drop")
    assert (len(kept), work.counts["dropped/scores tie"]) == (1, 3)


def test_answers_may_be_texts_and_columns_may_have_other_names(folder: Path) -> None:
    write_parquet(folder / "a.parquet", [{"question": "So?", "good": "Yes.", "bad": "No."}])
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    [row], _ = run_published(folder, makes="pairs", columns=columns)
    assert (row["id"], row["prompt"], row["score_chosen"]) == ("r0000000", "So?", None)
    assert row["chosen"] == conversation("So?", "Yes.") and row["rejected"] == conversation(
        "So?", "No."
    )


def test_prompts_of_a_preference_data_set(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [ultrafeedback(0), {**ultrafeedback(1), "source": "flan"}])
    [row, named], _ = run_published(folder, makes="prompts")
    assert (row["prompt"], row["instruction"], row["constraint"]) == ("So?", "So?", None)
    # The source decides the principles of answers.
    assert (row["source"], named["source"]) == ("published", "flan")


def test_split_chooses_files_and_limit_ends_early(folder: Path) -> None:
    write_jsonl(folder / "test_sft-0.jsonl", [ultrachat(9)])
    for part in range(2):
        rows = [ultrachat(10 * part + n) for n in range(3)]
        write_jsonl(folder / f"train_sft-{part}.jsonl", rows)
    rows, _ = run_published(folder, makes="dialogues", split="train_sft", limit=4)
    assert [row["id"] for row in rows] == ["p0/0", "p1/1", "p2/2", "p10/3"]
    assert [row["id"] for row in run_published(folder, makes="dialogues", split="test_sft")[0]] == [
        "p9/0"
    ]


@pytest.mark.parametrize(
    ("names", "split", "files"),
    [
        (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "train_gen-0.jsonl"], "train", ["train.jsonl"]),
        (["a.jsonl", ".cache/old.jsonl"], "train", ["a.jsonl"]),
        (["train.jsonl", "test.jsonl"], "train_sft", None),
        (["chat_train.jsonl", "chat_test.jsonl"], "train", None),
        (["a.jsonl"], "test", None),
    ],
)
def test_rows_of_another_split_are_never_read(
    folder: Path, names: list[str], split: str, files: list[str] | None
) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        write_jsonl(folder / name, [ultrachat(0)])
    if files is None:
        with pytest.raises(Permanent, match=f"no file of split '{split}'; it has "):
            data_files(folder, split)
    else:
        assert [path.name for path in data_files(folder, split)] == files


def test_parquet_is_streamed_without_a_copy_in_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set as large as UltraChat must not be copied into a cache first."""
    import datasets

    cache = folder.parent / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    write_parquet(folder / "a.parquet", [ultrachat(n) for n in range(3)])
    assert len(run_published(folder, makes="dialogues")[0]) == 3
    assert not list(cache.rglob("*.arrow"))


def test_rows_are_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are yielded before the last one is read, so a limit can end before a broken row."""
    write_jsonl(folder / "a.jsonl", [ultrachat(n) for n in range(5)])
    with (folder / "a.jsonl").open("a") as file:
        file.write("no JSON\n")
    assert len(run_published(folder, makes="dialogues", limit=5)[0]) == 5
    with pytest.raises(Permanent, match="a.jsonl line 6: not JSON"):
        run_published(folder, makes="dialogues")


def test_a_glob_address_is_read_through_fsspec(folder: Path) -> None:
    write_parquet(folder / "a.parquet", [ultrachat(0)])
    stage = Published(makes="dialogues", dataset=f"file://{folder}/*.parquet")
    work = Work("published", folder.parent / "artifact", 0, {}, {}, {})
    work.scratch.mkdir(parents=True)
    stage.check({}, {})
    stage.run(work)
    assert work.counts["rows"] == 1


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        (
            {"dataset": "owner/name"},
            (("owner/name",), {"split": "train", "revision": None}),
        ),
        (
            {"dataset": "owner/name", "split": "test_sft", "revision": "v1.1"},
            (("owner/name",), {"split": "test_sft", "revision": "v1.1"}),
        ),
        (
            {"dataset": "s3://bucket/*.parquet", "split": "test_sft"},
            (("parquet",), {"data_files": "s3://bucket/*.parquet", "split": "train"}),
        ),
    ],
)
def test_a_data_set_is_read_at_its_split_and_revision_up_to_the_limit(
    settings: Row, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls = []

    def load_dataset(*names: str, streaming: bool, **options: Any) -> Iterator[Row]:
        calls.append((names, options))
        assert streaming
        return (ultrachat(number) for number in itertools.count())  # only a limit ends it

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stage = Published(makes="dialogues", limit=3, **settings)
    work = Work("published", tmp_path, 0, {}, {}, {})
    stage.check({}, {})
    stage.run(work)
    assert calls == [call]
    assert [row["id"] for row in read_jsonl(tmp_path / "rows.jsonl")] == ["p0/0", "p1/1", "p2/2"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "b.arrow"])
def test_a_missing_column_is_one_error_line(name: str, folder: Path) -> None:
    WRITERS[name](folder / name, [{"text": "a"}])
    with pytest.raises(Permanent, match="has no column 'messages', .*has text; .*{messages: …}"):
        run_published(folder, makes="dialogues")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_broken_file_is_one_error_line_before_any_work(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"nothing of the kind")
    with pytest.raises(Permanent, match=f"{name} is not a valid .* file, or is truncated"):
        Published(makes="dialogues", files="set").check({"files": folder}, {})


def test_an_empty_file_is_one_error_line_before_any_work(folder: Path) -> None:
    (folder / "a.jsonl").write_text("\n")
    with pytest.raises(Permanent, match="a.jsonl has no rows; change the files setting"):
        Published(makes="dialogues", files="set").check({"files": folder}, {})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"files": "set", "dataset": "a/b"},
            "dataset: and files: are both set or both missing; set exactly one",
        ),
        ({}, "dataset: and files: are both set or both missing; set exactly one"),
        ({"files": "set", "columns": {"message": "x"}}, "'message' is not a column of dialogues"),
        ({"files": "set"}, "has no .parquet or .jsonl or .arrow file"),
    ],
)
def test_settings_are_checked(settings: Row, says: str, folder: Path) -> None:
    with pytest.raises(Permanent, match=says):
        Published(makes="dialogues", **settings).check({"files": folder}, {})


def test_a_file_of_another_format_is_refused(folder: Path) -> None:
    (folder / "a.csv").write_text("a,b\n")
    with pytest.raises(Permanent, match="a.csv has an unsupported format; convert it to JSONL"):
        data_files(folder / "a.csv", "train")


def test_two_formats_in_one_folder_are_refused(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [ultrachat(0)])
    write_parquet(folder / "b.parquet", [ultrachat(0)])
    with pytest.raises(Permanent, match="has .jsonl and .parquet files"):
        run_published(folder, makes="dialogues")


TOOL_TURN = {"role": "tool", "content": "4"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}
NARRATOR = {"role": "narrator", "content": "Dawn."}
SYSTEM_TURN = {"role": "system", "content": "Be brief."}
NO_TOOLS = "remove the conversations that use tools; only text can be trained"


@pytest.mark.parametrize(
    ("makes", "row", "says"),
    [
        ("dialogues", ultrachat(0, []), "no messages 3.*set columns: to the column of the conv"),
        ("dialogues", ultrachat(0, [*conversation("2+2?"), CALL, TOOL_TURN]), NO_TOOLS),
        (
            "dialogues",
            ultrachat(0, [NARRATOR, *conversation("Hi?", "a")]),
            r"none of the first rows is usable \(unknown role 3\), such as row 1 of a.jsonl "
            r"\(id 'p0', role 'narrator'\); rename the roles to system, user and assistant",
        ),
        (
            "dialogues",
            ultrachat(0, conversation("Hello.", "Hi?", "So.", first="assistant")),
            "remove the messages before the first user message",
        ),
        ("dialogues", ultrachat(0, conversation("Hi?", " ")), "write the missing texts, or set"),
        (
            "prompts",
            {"prompt": [SYSTEM_TURN, *conversation("Hi?")]},
            "remove the system messages; a prompt is the text of one user message",
        ),
    ],
)
def test_data_without_a_usable_row_is_refused_before_the_run(
    makes: str, row: Row, says: str, folder: Path
) -> None:
    write_jsonl(folder / "a.jsonl", [row] * 3)
    with pytest.raises(Permanent, match=says):
        Published(makes=makes, files="set").check({"files": folder}, {})  # type: ignore[arg-type]


def test_files_are_read_even_if_one_has_no_usable_row(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [ultrachat(0, [])])
    write_jsonl(folder / "b.jsonl", [ultrachat(1)])
    rows, work = run_published(folder, makes="dialogues")
    assert (len(rows), work.counts["dropped/no messages"]) == (1, 1)


def test_an_unreachable_hub_is_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    work = Work("published", tmp_path, 0, {}, {}, {})
    stage = Published(makes="dialogues", dataset="HuggingFaceH4/ultrachat_200k", split="train_sft")
    with pytest.raises(Permanent, match=r"'HuggingFaceH4/ultrachat_200k' \(split 'train_sft'\)"):
        stage.run(work)


def test_a_recipe_reads_files_and_their_content_is_in_the_key(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [ultrachat(0)])
    recipe_file = folder.parent / "recipe.yaml"
    recipe_file.write_text(
        "storage: runs\n"
        "models: {base: {weights: owner/name}}\n"
        "stages:\n"
        "  ultrachat: {kind: published, makes: dialogues, files: set}\n"
        "  sft: {kind: sft, model: base, data: ultrachat}\n"
    )
    store = Store(folder.parent / "runs")
    recipe = load(recipe_file, KINDS)
    check_files(recipe)
    before = [step.key for step in make_plan(recipe, store)]
    write_jsonl(folder / "b.jsonl", [ultrachat(1)])
    assert not set(before) & {step.key for step in make_plan(recipe, store)}
    recipe_file.write_text(recipe_file.read_text().replace("dialogues", "pairs"))
    with pytest.raises(
        Permanent, match="reads 'ultrachat', which makes pairs; name a stage that makes dialogues"
    ):
        load(recipe_file, KINDS)


def test_known_data_sets_are_planned_with_their_published_size() -> None:
    source = {"dataset": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}
    assert Published(makes="dialogues", **source).expected({}) == 207_865
    assert Published(makes="dialogues", **source, limit=100).expected({}) == 100
    assert Published(makes="dialogues", dataset="a/b").expected({}) is None
