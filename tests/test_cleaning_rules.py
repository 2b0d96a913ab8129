"""Tests the rules of cleaning on dialogues, prompts and pairs, and cleaning in blocks."""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from in_process import run, work_on

from zephyr_ray.errors import Permanent
from zephyr_ray.filters import cleaning_pass
from zephyr_ray.filters.cleaning_pass import CleaningPass
from zephyr_ray.filters.contamination import Contamination
from zephyr_ray.filters.language import find_language
from zephyr_ray.filters.passage import Filter, Tally
from zephyr_ray.filters.row_types import ROW_TYPES
from zephyr_ray.filters.section import cleaning_section
from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import assistant, user
from zephyr_ray.section import Answer, Sample
from zephyr_ray.stage import Work
from zephyr_ray.text.cleaning import Clean

Row = dict[str, Any]
EVALUATION = "Which of these five animals lives longest in the wild on average today?"
LONG = "The old lighthouse keeper counted every ship that passed the harbour that year and wrote"
DENIAL = "As an AI, I do not have feelings."
GERMAN = "Der Leuchtturm steht am Ende des Hafens, wo die Fischerboote abends nach Hause kommen."


def dialogue(name: str, *texts: str) -> Row:
    messages = [assistant(text) if i % 2 else user(text) for i, text in enumerate(texts)]
    return {"id": name, "messages": messages, "constraint": None}


def prompt(name: str, text: str, sentence: str = "") -> Row:
    row = {"id": name, "instruction": text, "constraint": None, "source": "generated"}
    return {**row, "prompt": text + sentence}


def pair(name: str, question: str, chosen: str, rejected: str) -> Row:
    return {
        **prompt(name, question),
        "chosen": [user(question), assistant(chosen)],
        "rejected": [user(question), assistant(rejected)],
    }


def clean(folder: Path, stage: Clean, **inputs: list[Row]) -> tuple[dict[str, Row], Work]:
    work = work_on(folder, **inputs)
    (folder / "sets.jsonl").write_text(json.dumps({"prompt": EVALUATION}) + "\n")
    (folder / "list.txt").write_text("fool\n")
    work.files = {
        "evaluation_sets": folder / "sets.jsonl",
        "toxic_words": folder / "list.txt",
    }
    stage.check(work.files, {})
    return {row["id"]: row for row in run(stage, work)}, work


RULES: dict[str, Any] = {
    "evaluation_sets": "sets.jsonl",
    "toxic_words": "list.txt",
    "refusals": "drop",
    "languages": ["en"],
    "max_words": 50,
    "near_duplicates": 0.6,
}


def test_a_dialogue_ends_before_the_exchange_that_breaks_a_rule(tmp_path: Path) -> None:
    rows = [
        dialogue("set", "One?", "1.", f"Now: {EVALUATION}", "2.", "Three?", "3."),
        dialogue("word", "One, please?", "Fool.", "Two?", "2."),
        dialogue("refusal", "Uno?", "1.", "Two?", "I'm sorry, but I can't help with that."),
        dialogue("german", "Eins?", "1.", GERMAN, GERMAN),
        dialogue("long", "One more?", "w " * 50, "Two?", "w " * 51),
        dialogue("first", f"{LONG} one?", "Yes."),
        dialogue("second", f"{LONG} two?", "Yes."),
    ]
    cleaned, work = clean(tmp_path, Clean(dialogues="dialogues", **RULES), dialogues=rows)
    assert {name: len(row["messages"]) for name, row in cleaned.items()} == {
        **dict.fromkeys(["set", "refusal", "german", "long", "first"], 2)
    }
    assert work.counts == {
        "rows": 5,
        "dropped dialogues": 1,
        "dropped/in evaluation set sets": 1,
        "dropped/toxic word": 1,
        "dropped/refusal": 1,
        "dropped/other language": 1,
        "dropped/longer than max_words": 1,
        "dropped/near duplicate": 1,
        "language not detected": 4,
    }
    assert work.examples["dropped/in evaluation set sets"] == [
        {
            "prompt": f"Now: {EVALUATION}",
            "answer": "2.",
            "why": EVALUATION.lower().removesuffix("?"),
            "left": "the exchanges before it: 1",
        }
    ]
    assert work.examples["dropped/near duplicate"] == [
        {"prompt": f"{LONG} two?\nYes.", "why": f"resembles: {LONG} one?\nYes."}
    ]


def test_rules_are_off_by_default(tmp_path: Path) -> None:
    rows = [
        dialogue("set", EVALUATION, "Fool."),
        dialogue("german", GERMAN, "I'm sorry, but I can't help with that."),
        dialogue("first", f"{LONG} one?", "w " * 500),
        dialogue("second", f"{LONG} two?", "w " * 500),
    ]
    cleaned, work = clean(tmp_path, Clean(dialogues="dialogues"), dialogues=rows)
    assert list(cleaned) == [row["id"] for row in rows] and work.counts == {"rows": 4}


def test_prompts_are_kept_or_removed(tmp_path: Path) -> None:
    sentence = " Answer in at most nine words, and end with a question mark."
    rows = [
        prompt("kept", "Name a river.", sentence),
        prompt("set", f"{EVALUATION} Say why."),
        prompt("word", "Describe a fool."),
        prompt("again", "NAME a river.", sentence),
        prompt("near", f"{LONG} one.", sentence),
        prompt("nearer", f"{LONG} two."),
        prompt("held out", "Name a lake and its river."),
    ]
    stage = Clean(prompts="prompts", apart_from="heldout", **(RULES | {"refusals": "keep"}))
    held_out = [prompt("h", "Name a lake and a river.")]
    cleaned, work = clean(tmp_path, stage, prompts=rows, heldout=held_out)
    assert list(cleaned.values()) == [rows[0], rows[4]]
    assert stage.makes == "prompts"
    assert {name: n for name, n in work.counts.items() if n} == {
        "rows": 2,
        "dropped/in evaluation set sets": 1,
        "dropped/toxic word": 1,
        "dropped/duplicate": 1,
        "dropped/near duplicate": 1,
        "dropped/near a held-out prompt": 1,
        "language not detected": 2,
    }
    assert work.examples["dropped/toxic word"] == [
        {"prompt": "Describe a fool.", "why": "“fool”", "left": "nothing"}
    ]


def test_pairs_are_judged_by_their_prompt_and_chosen_answer(tmp_path: Path) -> None:
    refusal = "I cannot help with that."
    rows = [
        pair("kept", "Who am I?", "A friend.", "fool, a fool."),
        pair("refused", "Who are you?", refusal, "Ann."),
        pair("refuses", "Who is he?", "Ben.", refusal),
        pair("set", EVALUATION, "1.", "2."),
        pair("rejected", "Which one?", "1.", f"The question was: {EVALUATION}"),
        pair("denial", "Are you sad?", DENIAL, "No."),
        pair("again", "Who AM I?", "A friend.", "fool, a fool."),
        pair("other", "Who am I?", "A friend.", "Nobody."),
    ]
    cleaned, work = clean(tmp_path, Clean(pairs="pairs", **RULES), pairs=rows)
    assert list(cleaned.values()) == [rows[0], rows[2], rows[7]]
    assert work.counts["dropped/in evaluation set sets"] == 2
    assert work.counts["dropped/unhelpful assistant"] == 1
    assert "true-cased" not in work.counts


def test_pairs_of_one_prompt_are_not_near_duplicates_of_each_other(tmp_path: Path) -> None:
    rows = [
        pair("first", "Who am I?", LONG, "A friend."),
        pair("second", "Who am I?", LONG, "Nobody."),
        pair("other", "Who am I now?", LONG, "A friend."),
    ]
    cleaned, work = clean(tmp_path, Clean(pairs="pairs", near_duplicates=0.6), pairs=rows)
    assert list(cleaned) == ["first", "second"]
    assert work.counts["dropped/near duplicate"] == 1


def test_a_rule_that_removes_everything_names_its_fix(tmp_path: Path) -> None:
    rows = [dialogue("a", "One?", "1."), dialogue("b", "Two?", "Fool."), dialogue("c", "3?", "3.")]
    line = (
        "stage 'stage': every dialogue was dropped (2 shorter than min_words, 1 toxic word); "
        "lower min_words"
    )
    stage = Clean(dialogues="dialogues", min_words=2, **(RULES | {"toxic_words": "list.txt"}))
    rows[1]["messages"][1]["content"] = "Fool that you are."
    with pytest.raises(Permanent) as error:
        clean(tmp_path, stage, dialogues=rows)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "reads nothing; set exactly one of dialogues, prompts, pairs"),
        ({"dialogues": "d", "pairs": "p"}, "reads dialogues and pairs; set exactly one of"),
        ({"pairs": "p", "judge": "j"}, "judge: only answers in dialogues are scored; remove judge"),
        ({"prompts": "p", "refusals": "drop"}, "refusals: prompts have no answers; remove"),
        ({"dialogues": "d", "min_words": 9, "max_words": 8}, "min_words is 9, max_words 8; lower"),
        ({"dialogues": "d", "languages": ["xx"]}, "languages: unknown 'xx'"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], line: str) -> None:
    with pytest.raises(Permanent, match=line):
        Clean(**values).check({}, {})


def many(count: int) -> list[Row]:
    """Returns dialogues of which some break a rule, some resemble an earlier one, and the last
    repeats one."""
    texts = ["Fool.", DENIAL, "ann. i think so.", "Yes."]
    first = [dialogue(f"first {n}", f"Count to {n}, please.", "Yes.") for n in range(4)]
    rows = [dialogue(f"{n}", f"{LONG} {'x ' * n}?", texts[n % 4]) for n in range(count)]
    return [*first, *rows, dialogue("again", rows[2]["messages"][0]["content"], texts[2])]


def in_blocks(folder: Path, lines: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Cleans in blocks of `lines` rows, the last block first, each in its own copy of the pass."""

    def run_blocks(function: Any, blocks: list[Any], failure: str) -> Any:
        copies = (pickle.loads(cloudpickle.dumps(function)) for _ in blocks)
        return (copy(block) for copy, block in zip(copies, reversed(blocks), strict=True))

    folder.mkdir()
    monkeypatch.setattr("zephyr_ray.blocks.BLOCK_LINES", lines)
    monkeypatch.setattr(cleaning_pass, "run_blocks", run_blocks)
    stage = Clean(dialogues="dialogues", **RULES)
    cleaned, work = clean(folder, stage, dialogues=many(20))
    assert work.progress.done == 25
    return cleaned, work.counts, work.examples


def test_rows_are_the_same_for_any_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = in_blocks(tmp_path / "whole", 1000, monkeypatch)
    assert in_blocks(tmp_path / "three", 3, monkeypatch) == whole
    counts = whole[1]
    assert counts["dropped/duplicate"] == 1 and counts["dropped/near duplicate"] > 2
    assert counts["dropped/toxic word"] == 5 and len(whole[2]["dropped/toxic word"]) == 3
    assert [example["prompt"] for example in whole[2]["dropped/toxic word"]] == [
        f"{LONG} {'x ' * n}?" for n in (0, 4, 8)
    ]


def test_the_driver_reads_one_row_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many(9)))
    finished: list[int] = []
    rows = CleaningPass(
        path=tmp_path / "rows.jsonl",
        source="dialogues",
        folder=tmp_path / "scratch",
        rows=ROW_TYPES["dialogues"],
        filters=[
            Filter(Contamination({"a": [EVALUATION]})),
            Filter(partial(find_language, languages=["en"])),
        ],
        scores={},
        similarity=None,
    ).run(Tally(), finished.append)
    assert next(rows)["id"] == "first 0" and finished == [14]
    assert not list((tmp_path / "scratch").glob("*.pickle"))


def test_the_report_shows_examples_before_and_after_cleaning() -> None:
    manifest = Manifest(
        kind="clean",
        key="k",
        files={},
        counts={"rows": 5, "dropped/refusal": 2, "dropped/toxic word": 0, "true-cased": 7},
        examples={
            "dropped/refusal": [{"prompt": "Q?", "answer": "No.", "why": "w", "left": "nothing"}],
            "true-cased": [["hello.", "Hello."]],
            "dropped/duplicate": ["not counted"],
        },
    )
    section = cleaning_section(manifest)
    assert section
    [chapter] = section.chapters
    table, *samples = chapter.blocks
    assert table.rows == (("true-cased", 7), ("refusal", 2), ("toxic word", 0))  # type: ignore[union-attr]
    assert samples == [
        Sample("true-cased", (Answer("before", "hello."), Answer("after", "Hello."))),
        Sample(
            "refusal",
            (Answer("before", "Q?\n\nNo."), Answer("after", "(nothing)", reasons=("why: w",))),
        ),
    ]


def test_the_report_shows_examples_of_earlier_versions() -> None:
    counts, examples = {"dropped/duplicate": 1}, {"dropped/duplicate": ["Q?"]}
    old = Manifest(kind="clean", key="k", files={}, counts=counts, examples=examples)
    section = cleaning_section(old)
    assert section and section.chapters[0].blocks[1] == Sample(
        "duplicate", (Answer("before", "Q?"), Answer("after", "(nothing)"))
    )
    assert cleaning_section(Manifest(kind="clean", key="k", files={}, counts={"rows": 1})) is None
