"""Tests that conversations are read by role, through every stage from pairs to training."""

from pathlib import Path
from typing import Any

import pytest
import train_once
from in_process import run, work_on

from zephyr_ray.messages import (
    Exchange,
    Message,
    assistant,
    exchanges,
    is_same_text,
    user,
    visible,
    with_facts,
)
from zephyr_ray.text.cleaning import Clean
from zephyr_ray.text.preferences import Chosen
from zephyr_ray.train.model import load_chat
from zephyr_ray.train.sft import Sft

Row = dict[str, Any]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "42"}
DENIAL = "As an AI, I have no opinions."


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("a"), assistant("b"), user("c"), assistant("d")], [(0, (0,), 1), (2, (2,), 3)]),
        ([SYSTEM, user("a"), assistant("b")], [(0, (1,), 2)]),
        ([user("a"), assistant("b"), SYSTEM, user("c"), assistant("d")],
         [(0, (0,), 1), (2, (3,), 4)]),
        ([user("a"), user("b"), assistant("c")], [(0, (0, 1), 2)]),
        ([user("a"), assistant("b"), user("c")], [(0, (0,), 1)]),
        ([user("a"), assistant("b"), TOOL, assistant("c")], [(0, (0,), 1), (2, (0,), 3)]),
        ([assistant("a"), user("b"), assistant("c")], [(0, (), 0), (1, (1,), 2)]),
        ([user("a")], []),
        ([], []),
    ],
    ids=["plain", "system", "later system", "two users", "user last", "tool", "greeting", "user",
         "none"],
)  # fmt: skip
def test_exchanges_follow_the_roles(
    messages: list[Message], expected: list[tuple[int, tuple[int, ...], int]]
) -> None:
    assert list(exchanges(messages)) == [Exchange(*exchange) for exchange in expected]


def clean(folder: Path, messages: list[Message], *held_out: str) -> list[str]:
    rows = [{"id": "d", "messages": messages, "constraint": None}]
    # Another dialogue, so that not all are dropped.
    rows.append({"id": "e", "messages": [user("Other?"), assistant("Yes.")], "constraint": None})
    work = work_on(folder, dialogues=rows, heldout=[{"instruction": text} for text in held_out])
    cleaned = run(Clean(dialogues="dialogues", apart_from="heldout"), work)
    return [m["content"] for row in cleaned if row["id"] == "d" for m in row["messages"]]


FIRST = [user("Hi there. who are you?"), assistant("Ann. i think so.")]
CLEANED = ["Hi there. Who are you?", "Ann. I think so."]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([SYSTEM, *FIRST, user("Why?"), assistant(DENIAL)], ["Be brief.", *CLEANED]),
        ([*FIRST, SYSTEM, user("Why?"), assistant(DENIAL)], CLEANED),
        ([*FIRST, SYSTEM, user("Why?"), assistant("So.")], [*CLEANED, "Be brief.", "Why?", "So."]),
        ([*FIRST, user("One more."), user("Why?"), assistant(DENIAL)], CLEANED),
        ([*FIRST, user("Held out prompt?"), user("Why?"), assistant("So.")], CLEANED),
        ([*FIRST, user("Why?"), user("Held out prompt?"), assistant("So.")], CLEANED),
        ([user("Well. who is it?"), *FIRST], ["Well. Who is it?", *CLEANED]),
        ([*FIRST, user("Held out prompt?")], CLEANED),
        ([*FIRST, TOOL, assistant("So. i do.")], [*CLEANED, "42", "So. I do."]),
        ([assistant("Hi. i am Ann."), *FIRST], ["Hi. I am Ann.", *CLEANED]),
        ([assistant(DENIAL), *FIRST], []),
        ([assistant("Hi."), user("Why?"), assistant(DENIAL)], []),
        ([SYSTEM, user("Why?"), assistant(DENIAL), *FIRST], []),
    ],
    ids=["system", "later system cut", "later system", "two users cut", "held-out of two users",
         "held-out second of two users", "two users", "user last", "tool", "greeting",
         "denial as greeting", "only a greeting", "denial first"],
)  # fmt: skip
def test_clean_reads_roles(messages: list[Message], expected: list[str], tmp_path: Path) -> None:
    assert clean(tmp_path, messages, "Held out prompt?") == expected


def pair(last: str, finish: str | None, old: bool = False) -> Row:
    """Returns a pair with two turns; `finish` is why the last chosen answer ended, in a column of
    the row if `old`, as in earlier versions."""
    context = [SYSTEM, user("Where is Oslo?"), assistant("In Norway.")]
    facts = {} if old or finish is None else {"finish_reason": finish}
    stated = user(f"{last} Use at most 9 words.", instruction=last)
    row = {"id": last, "prompt": last, "instruction": last, "constraint": None}
    row["chosen"] = [*context, stated, assistant("Yes.", **facts)]
    row["rejected"] = [*context, stated, assistant("No.")]
    return {**row, "finish_chosen": finish, "finish_rejected": "stop"} if old else row


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_pairs_of_many_turns_become_clean_dialogues(old: bool, tmp_path: Path) -> None:
    pairs = [pair("Is it cold?", "stop", old), pair("Who lives there?", "length", old)]
    (tmp_path / "chosen").mkdir()
    (tmp_path / "clean").mkdir()
    chosen = run(Chosen(pairs="pairs"), work_on(tmp_path / "chosen", pairs=pairs))
    assert [[m.get("finish_reason") for m in row["messages"]] for row in chosen] == [
        [None, None, None, None, "stop"],
        [None, None, None, None, "length"],
    ]
    work = work_on(tmp_path / "clean", dialogues=chosen[::-1], heldout=[pairs[0]])
    [kept] = run(Clean(dialogues="dialogues", apart_from="heldout"), work)
    # The second dialogue is cut before the held-out question; the rest of it is a duplicate.
    assert kept["messages"] == chosen[1]["messages"]
    assert work.counts["dropped/near a held-out prompt"] == 1


TALK = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"finish": ["length"]}, {"finish_reason": [None, "length"]}),
        ({"finish": ["length", "stop"]}, {"finish_reason": ["length", "stop"]}),
        ({"instructions": ["c"]}, {"instruction": [None, "c"]}),
        ({"instructions": ["a"]}, {"instruction": [None, None]}),  # not the last question
    ],
)
def test_fewer_old_facts_than_messages_belong_to_the_last_ones(columns: Row, expected: Row) -> None:
    row = with_facts({"id": "r", "messages": TALK, **columns})
    [(fact, values)] = expected.items()
    role = {"finish_reason": "assistant", "instruction": "user"}[fact]
    assert [m.get(fact) for m in row["messages"] if m["role"] == role] == values


ENDED = assistant("It is an ash.", finish_reason="stop")
CUT_OFF = assistant("It is an", finish_reason="length")


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ((ENDED, CUT_OFF, ENDED), [True, False, True]),
        ((CUT_OFF, ENDED, CUT_OFF), [False, True, False]),
        ((assistant("It is."), CUT_OFF, assistant("It is.")), [True, False, True]),
    ],
)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["plain", "system"])
def test_the_end_of_each_answer_is_trained_unless_it_was_cut_off(
    said: tuple[Message, ...],
    ends: list[bool],
    system: list[Message],
    tiny_model: Path,
) -> None:
    chat, stage = load_chat(str(tiny_model)), Sft(model="base", data="data", packing=False)
    messages = [*system, *(m for answer in said for m in (user("Which tree?"), answer))]
    row = train_once.tokens(stage, chat, {"id": "r", "messages": messages})
    stops = [at for at, token in enumerate(row["input_ids"]) if token == chat.stop_token_id]
    # Every message ends with this token, and every second message is an answer.
    answers = stops[len(system) + 1 :: 2]
    assert [row["labels"][at] == chat.stop_token_id for at in answers] == ends


@pytest.mark.parametrize(
    "character", ["\u061c", "\u034f", "\u180b", "\U000e0041", "\u200b", "\x07"]
)
def test_characters_without_a_shape_are_not_visible(character: str) -> None:
    assert visible(character) == ""
    assert is_same_text(f"Good{character}", "Good")
