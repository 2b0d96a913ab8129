"""Tests that rows of earlier versions, with facts in parallel columns, are read as rows whose
messages carry the facts."""

from pathlib import Path
from typing import Any

import pytest
import train_once
from in_process import run, run_here, work_on

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.messages import Message, assistant, user, with_facts
from zephyr_ray.text import cleaning
from zephyr_ray.text.cleaning import Clean
from zephyr_ray.text.dialogues import SelfRefine
from zephyr_ray.text.preferences import Chosen
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.model import load_chat
from zephyr_ray.train.sft import Sft

Row = dict[str, Any]
SYSTEM = {"role": "system", "content": "Be brief."}
REPEAT = " Say my request again without changing a word, then give the answer."


def plain(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def new_and_old(name: str, finish: list[str], system: bool = False) -> tuple[Row, Row]:
    """Returns a dialogue of two exchanges in both formats."""
    asked = ["Name a pet.", "Name a tree."]
    said = [f"{asked[0]} A {name}.", f"{asked[1]} An ash."]
    new, old = [SYSTEM] * system, [SYSTEM] * system
    for instruction, text, reason in zip(asked, said, finish, strict=True):
        new.append(user(instruction + REPEAT, instruction=instruction))
        new.append(assistant(text, finish_reason=reason))
        old += [plain("user", instruction + REPEAT), plain("assistant", text)]
    row = {"id": name, "constraint": {"kind": "repeat_question"}}
    facts = {"finish": finish, "instructions": asked}
    return {**row, "messages": new}, {**row, "messages": old, **facts}


def test_answers_in_a_journal_of_an_earlier_version_are_kept(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "p", "instruction": "p", "constraint": None}
    work = work_on(tmp_path, prompts=[row])
    work.models = {"m": Model("m", RulesSettings())}
    messages = [plain("user", "p"), plain("assistant", "x")]
    old = {**row, "messages": messages, "instructions": ["p"], "finish": ["length"]}
    work.journal("rows", "worker").append({"id": "a", "row": old})
    [kept] = run(SelfRefine(model="m", prompts="prompts", turns=1), work)
    asked, answer = user("p", instruction="p"), assistant("x", finish_reason="length")
    assert kept["messages"] == [asked, answer]
    assert work.counts["truncated"] == 1


DIALOGUES = [
    new_and_old("whole", ["stop", "stop"]),
    new_and_old("late", ["stop", "length"]),
    new_and_old("early", ["length", "stop"]),
    new_and_old("system", ["stop", "length"], system=True),
]
NEW, OLD = ([pair[n] for pair in DIALOGUES] for n in (0, 1))


def pair(chosen: str, rejected: str) -> tuple[Row, Row]:
    """Returns a pair whose answers end for these reasons, in both formats. Questions of old
    pairs have no instructions, so those of new ones have none here."""
    row = {"id": f"{chosen}-{rejected}", "constraint": None, "prompt": "Name a pet."}
    sides = {"chosen": ("A cat.", chosen), "rejected": ("A dog.", rejected)}
    asked = user("Name a pet.")
    new = {s: [asked, assistant(text, finish_reason=why)] for s, (text, why) in sides.items()}
    old = {s: [asked, plain("assistant", text)] for s, (text, _) in sides.items()}
    facts = {"finish_chosen": chosen, "finish_rejected": rejected}
    return {**row, **new}, {**row, **old, **facts}


PAIRS = [pair("stop", "length"), pair("length", "stop"), pair("stop", "stop")]
NEW_PAIRS, OLD_PAIRS = ([made[n] for made in PAIRS] for n in (0, 1))


@pytest.mark.parametrize(("new", "old"), [*DIALOGUES, *PAIRS], ids=lambda row: row["id"])
def test_old_rows_are_read_as_new_ones(new: Row, old: Row) -> None:
    assert with_facts(old) == new
    assert with_facts(new) == new


def test_facts_of_messages_override_columns() -> None:
    new, _ = new_and_old("whole", ["length", "stop"])
    assert with_facts({**new, "finish": ["stop", "stop"]}) == new


def test_a_row_without_facts_has_none() -> None:
    row = {"id": "r", "messages": [plain("user", "a"), plain("assistant", "b")]}
    assert with_facts(row) == row


def test_cleaning_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, cleaning)
    made = []
    for name, rows in (("new", NEW), ("old", OLD)):
        (tmp_path / name).mkdir()
        work = work_on(tmp_path / name, dialogues=rows)
        work.models = {"judge": Model("judge", RulesSettings())}
        kept = run(Clean(dialogues="dialogues", judge="judge"), work)
        made.append((kept, work.counts, work.examples))
    assert made[0] == made[1]
    # Answers that were cut off fail a check of the judge.
    assert {row["id"]: len(row["messages"]) for row in made[0][0]} == {
        "whole": 4,
        "late": 2,
        "system": 3,
    }


def test_chosen_dialogues_are_the_same(tmp_path: Path) -> None:
    def ends(name: str, rows: list[Row]) -> list[str]:
        (tmp_path / name).mkdir()
        # Three texts, so that none is a duplicate.
        rows = [
            {**row, "chosen": [user(f"{row['id']}?"), *row["chosen"][1:]], "id": row["id"]}
            for row in rows
        ]
        made = run(Chosen(pairs="pairs"), work_on(tmp_path / name, pairs=rows))
        return [row["messages"][-1]["finish_reason"] for row in made]

    assert ends("new", NEW_PAIRS) == ends("old", OLD_PAIRS) == ["stop", "length", "stop"]


def test_sft_trains_the_same_tokens(tmp_path: Path, tiny_model: Path) -> None:
    chat, stage = load_chat(str(tiny_model)), Sft(model="base", data="data", packing=False)
    work = train_once.work_for(tmp_path, tiny_model, [])
    new, old = (list(train_once.prepare(stage, work, rows)) for rows in (NEW, OLD))
    assert new == old
    ends = [row["labels"].count(chat.stop_token_id) for row in old]
    assert ends == [2, 1, 1, 1]


def test_dpo_trains_the_same_tokens(tmp_path: Path, tiny_model: Path) -> None:
    chat, stage = load_chat(str(tiny_model)), Dpo(model="base", data="data")
    work = train_once.work_for(tmp_path, tiny_model, [])

    def tokens(rows: list[Row]) -> list[Row]:
        return list(train_once.prepare(stage, work, rows))

    old = tokens(OLD_PAIRS)
    assert tokens(NEW_PAIRS) == old
    ended = [
        [row[f"{s}_ids"][-1] == chat.stop_token_id for s in ("chosen", "rejected")] for row in old
    ]
    assert ended == [[True, False], [False, True], [True, True]]
