"""Tests that conversations of published data are read in every form, or refused with the reason."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_published import conversation, run_published, write_jsonl, write_parquet

from zephyr_ray.conversations import NOT_JSON, ONE_TEXT, Unreadable, parse
from zephyr_ray.errors import Permanent
from zephyr_ray.published_rows import FIXES
from zephyr_ray.stage import Work
from zephyr_ray.text.published import Published

Row = dict[str, Any]

TWO = conversation("Name a bird.", "A wren.")
SHAREGPT = [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "A wren."}]
PARTS = ("A ", "wren.")
COLUMNS = {"role": ["user", "assistant"], "content": ["Name a bird.", "A wren."]}


@pytest.mark.parametrize(
    "value",
    [
        TWO,
        SHAREGPT,
        [{"from": "user", "value": "Name a bird."}, {"from": "bing", "value": "A wren."}],
        [{"role": "Human", "content": "Name a bird."}, {"role": "model", "content": "A wren."}],
        # Arrow gives every message the keys of all messages.
        [{"role": None, "content": None, **message} for message in SHAREGPT],
        [{"role": "system", "content": ""}, *TWO],
        [{**TWO[0], "weight": 0}, {**TWO[1], "weight": 1, "tool_calls": None}],
        [
            TWO[0],
            {"role": "assistant", "content": [{"type": "text", "text": part} for part in PARTS]},
        ],
        COLUMNS,
        {"from": ["human", "gpt"], "value": ["Name a bird.", "A wren."]},
        json.dumps(TWO),
        json.dumps(TWO, indent=1),
        json.dumps(SHAREGPT),
        json.dumps(COLUMNS),
        str(TWO),
        str(tuple(TWO)),
        str(TWO)[1:-1],
        {"messages": TWO},
        json.dumps({"messages": TWO}),
        json.dumps({"id": 3, "conversations": SHAREGPT}, indent=1),
        json.dumps(json.dumps(TWO)),
        json.dumps({"messages": json.dumps(TWO)}),
        "\n\nHuman: Name a bird.\n\nAssistant: A wren.",
        "Human: Name a bird.\n\nAssistant: A wren.",
        "### Human: Name a bird.### Assistant: A wren.",
        "### Human: Name a bird.\n### Assistant: A wren.",
    ],
)
def test_a_conversation_is_read_in_every_form(value: Any) -> None:
    assert parse(value) == TWO


@pytest.mark.parametrize(
    "text",
    [
        "Name a bird.",
        "\n\nThe Oder.",
        "[1, 2, 3] comes before what?",
        '{"role": "x"} is JSON, is it not?',
        '[{"name": "Ada"}]',
        "Human: what is a human?",
        "What does <|im_start|> mean?",
        "What is the user for?\nUser: root",
        "My assistant wrote 'User: Hi.' and then\nAssistant: Hello.",
        "Explain the tags [INST] and [/INST].",
        "What does <|user|> mean in a template?",
        'Explain: print("<|im_start|>" + role), "<|im_start|>user\\n".',
        '[{"text": "a"}, {"text": "b"}]',
        '"Be brief" is what?',
        "A chat between two friends: write it.",
        "Write a dialogue with a doctor.\nUser: Hello\nAssistant: Hi",
        "Why does my model print <|im_start|>assistant for ever?",
        "Explain the tokens <|user|> and <|assistant|>.",
        "Below is an instruction that describes a task. Summarize it.",
        "[" * 100_000,
    ],
)
def test_a_plain_text_is_returned_unchanged(text: str) -> None:
    assert parse(text) == text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no messages"),
        ([], "no messages"),
        (["Name a bird.", "A wren."], "a text without roles"),
        ([{"speaker": "a", "words": "b"}], "messages without role and content"),
        ([{"role": "tool", "content": "x"}], "a tool turn"),
        ([{"role": "narrator", "content": "x"}], "unknown role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a message that is not text"),
        ({"role": ["user"], "content": ["a", "b"]}, "as many roles as texts are needed"),
        (json.dumps(TWO)[:-1], "messages as text that is not JSON"),
        (str(TWO).replace("}, {", "}\n {"), "messages as text that is not JSON"),  # NumPy's format
        (json.dumps([{"id": 3, **message} for message in TWO])[:-1], NOT_JSON),
        (json.dumps(json.dumps(TWO))[:-3], NOT_JSON),
        ("\n".join(json.dumps(message) for message in TWO), NOT_JSON),
        (json.dumps([{"speaker": "a", "text": "b"}]), ONE_TEXT),
        (json.dumps({"data": TWO}), ONE_TEXT),
        ({"messages": "Hi."}, "a text without roles"),
        ("Be kind.\n\nHuman: Hi.\n\nAssistant: Hello.", ONE_TEXT),
        ("\n\nSystem: S\n\nHuman: Hi.\n\nAssistant: Hello.", ONE_TEXT),
        ("Be kind.### Human: Hi.### Assistant: Hello.", ONE_TEXT),
        ("A chat between a user and a bot. USER: Hi. ASSISTANT: Hello.</s>", ONE_TEXT),
        ("<|User|>Hi.<|Assistant|>Hello.", ONE_TEXT),
        ("<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Hi.", ONE_TEXT),
        ("Be kind.<|User|>Hi.<|Assistant|>Hello.", ONE_TEXT),
        ("[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Hi.[/INST]", ONE_TEXT),
        ("S\n[INST]Hi.[/INST]", ONE_TEXT),
        ("<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi.", ONE_TEXT),
        ("<|endoftext|><|im_start|>user\nHi.<|im_end|>", ONE_TEXT),
        ("Be kind.<|im_start|>user\nHi.<|im_end|>", ONE_TEXT),
        ("S<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi.", ONE_TEXT),
        ("Be kind. <|im_start|>user\nHi.<|im_end|>", ONE_TEXT),
        ("Below is an instruction that describes a task.\n\n### Response:", ONE_TEXT),
        ([TWO[0], {**TWO[1], "weight": 0}], "a message excluded from training"),
        ([TWO[0], {**TWO[1], "train": False}], "a message excluded from training"),
        ({**COLUMNS, "weight": [1, 0]}, "a message excluded from training"),
        ([TWO[0], {**TWO[1], "tool_calls": [{"id": "a"}]}], "a tool turn"),
        ([TWO[0], {**TWO[1], "function_call": {"name": "f"}}], "a tool turn"),
        ("Human: Hi.\nAssistant: Hello.", "a conversation as one text"),
        ("USER: Hi. ASSISTANT: Hello.</s>", "a conversation as one text"),
        ("<|im_start|>user\nHi.<|im_end|>", "a conversation as one text"),
        ("<s>[INST] Hi. [/INST] Hello.</s>", "a conversation as one text"),
        ("### Instruction:\nHi.\n\n### Response:\nHello.", "a conversation as one text"),
    ],
)
def test_an_unreadable_value_is_refused_with_the_reason(value: Any, reason: str) -> None:
    assert reason in FIXES
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        parse(value)


@pytest.mark.parametrize(
    "unit",
    [
        *("\n", "[", "(", " ", "\\", '{"role": ', '{"messages": ', '{"messages": [', "'role'\n"),
        *("### Instruction: ", "User: ", "### Human:", "\n\nHuman: ", "\n\nAssistant: "),
        *("<|im_start|>", "<|user|>", "> [INST]", "A chat between "),
    ],
)
def test_no_text_takes_long_to_read(unit: str) -> None:
    many = unit * (400_000 // len(unit))
    start = time.process_time()
    for text in ("Human: " + many, many, '{"role": "content": ' + many):
        with contextlib.suppress(Unreadable):
            parse(text)
    assert time.process_time() - start < 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def rows_of(folder: Path, *rows: Row, **settings: Any) -> tuple[list[Row], dict[str, float]]:
    write_jsonl(folder / "train.jsonl", list(rows))
    made, work = run_published(folder, **settings)
    counts = {k: n for k, n in work.counts.items() if k not in ("rows", "characters")}
    return made, counts


def answers(*texts: str) -> list[dict[str, str]]:
    return conversation(*texts, first="assistant")


SUM, FOUR, FIVE = "What is two and two?", "Four.", "Five."
OSLO = "\n\nHuman: Where is Oslo?\n\nAssistant:"
COLD = " In Norway.\n\nHuman: Is it cold?\n\nAssistant:"
NORWAY = ("Where is Oslo?", "In Norway.", "Is it cold?")
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "context", "texts"),
    [
        (  # explicit
            {"prompt": conversation(SUM), "chosen": answers(FOUR), "rejected": answers(FIVE)},
            conversation(SUM),
            (FOUR, FIVE),
        ),
        (  # implicit
            {"chosen": conversation(SUM, FOUR), "rejected": conversation(SUM, FIVE)},
            conversation(SUM),
            (FOUR, FIVE),
        ),
        (  # mixed
            {"prompt": SUM, "chosen": answers(FOUR), "rejected": answers(FIVE)},
            conversation(SUM),
            (FOUR, FIVE),
        ),
        (
            {"prompt": [SYSTEM, *conversation(SUM)], "chosen": FOUR, "rejected": FIVE},
            [SYSTEM, *conversation(SUM)],
            (FOUR, FIVE),
        ),
        (  # one message alone, as LLaMA-Factory writes it
            {"prompt": conversation(SUM), "chosen": answers(FOUR)[0], "rejected": answers(FIVE)[0]},
            conversation(SUM),
            (FOUR, FIVE),
        ),
        (
            {"chosen": OSLO + COLD + " In winter, yes.", "rejected": OSLO + COLD + " No idea."},
            conversation(*NORWAY),
            ("In winter, yes.", "No idea."),
        ),
        (
            {
                "prompt": "Where is Oslo?",
                "chosen": "\n\nAssistant: In Norway.",
                "rejected": "\n\nAssistant: Somewhere.",
            },
            conversation("Where is Oslo?"),
            ("In Norway.", "Somewhere."),
        ),
        (
            {"prompt": OSLO, "chosen": " In Norway.", "rejected": " Somewhere."},
            conversation("Where is Oslo?"),
            ("In Norway.", "Somewhere."),
        ),
        (
            {
                "prompt": OSLO + COLD,
                "chosen": OSLO + COLD + " Yes.",
                "rejected": OSLO + COLD + " No.",
            },
            conversation(*NORWAY),
            ("Yes.", "No."),
        ),
        (
            {
                "prompt": SUM,
                "chosen": json.dumps(conversation(SUM, FOUR)),
                "rejected": json.dumps(conversation(SUM, FIVE)),
            },
            conversation(SUM),
            (FOUR, FIVE),
        ),
        (  # the prompt is the first question, or the last
            {
                "prompt": "Where is Oslo?",
                "chosen": conversation(*NORWAY, "Yes."),
                "rejected": conversation(*NORWAY, "No."),
            },
            conversation(*NORWAY),
            ("Yes.", "No."),
        ),
        (
            {
                "prompt": "Is it cold?",
                "chosen": conversation(*NORWAY, "Yes."),
                "rejected": conversation(*NORWAY, "No."),
            },
            conversation(*NORWAY),
            ("Yes.", "No."),
        ),
        (  # Intel's orca_dpo_pairs, with columns: {prompt: question}
            {"system": "Be brief.", "prompt": SUM, "chosen": FOUR, "rejected": FIVE},
            [SYSTEM, *conversation(SUM)],
            (FOUR, FIVE),
        ),
        (
            {"system": "", "prompt": SUM, "chosen": FOUR, "rejected": FIVE},
            conversation(SUM),
            (FOUR, FIVE),
        ),
        (
            {"prompt": "Name a river.", "chosen": "\n\nThe Oder.", "rejected": "No."},
            conversation("Name a river."),
            ("\n\nThe Oder.", "No."),
        ),
    ],
)
def test_pairs_are_read_in_every_form(
    row: Row, context: list[Row], texts: tuple[str, str], folder: Path
) -> None:
    [pair], counts = rows_of(folder, row, makes="pairs")
    assert pair["chosen"] == [*context, *answers(texts[0])]
    assert pair["rejected"] == [*context, *answers(texts[1])]
    assert counts == {}
    first, *_, last = [m["content"] for m in context if m["role"] == "user"] * 2
    assert pair["prompt"] in (first, last)


GOOD = {"prompt": SUM, "chosen": FOUR, "rejected": FIVE}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {**GOOD, "chosen": conversation(SUM, FOUR), "rejected": conversation(*NORWAY, FIVE)},
            "chosen and rejected have different numbers of turns",
        ),
        (
            {**GOOD, "chosen": conversation(SUM, FOUR, "So?"), "rejected": FIVE},
            "no answer at the end",
        ),
        (
            {
                "prompt": "Q?",
                "chosen": conversation(SUM, FOUR),
                "rejected": conversation(SUM, FIVE),
            },
            "the prompt is not that of the conversations",
        ),
        (
            {
                "prompt": [SYSTEM, *conversation(SUM)],
                "chosen": conversation(SUM, FOUR),
                "rejected": conversation(SUM, FIVE),
            },
            "the prompt is not that of the conversations",
        ),
        ({**GOOD, "prompt": conversation(SUM, "Hm.")}, "roles do not alternate"),
        ({**GOOD, "prompt": " \u200b"}, "empty prompt"),
        ({**GOOD, "chosen": "\u200b"}, "empty assistant message"),
        ({**GOOD, "chosen": "\n\nAssistant:"}, "empty assistant message"),
        ({**GOOD, "prompt": "\n\nHuman: \n\nAssistant:"}, "empty user message"),
        ({**GOOD, "prompt": "\n\nHuman: "}, "empty user message"),
        ({**GOOD, "rejected": "Four.\n"}, "chosen and rejected are the same"),
        ({**GOOD, "prompt": "<|im_start|>user\nHi."}, "a conversation as one text"),
        (
            {**GOOD, "prompt": [SYSTEM, *conversation(SUM)], "system": "Be long."},
            "two system prompts",
        ),
    ],
)
def test_an_unreadable_pair_is_dropped_with_the_reason(row: Row, reason: str, folder: Path) -> None:
    assert reason in FIXES
    made, counts = rows_of(folder, GOOD, row, makes="pairs")
    assert (len(made), counts) == (1, {f"dropped/{reason}": 1})


@pytest.mark.parametrize("messages", [COLUMNS, TWO, SHAREGPT])
def test_messages_in_parquet_are_read(messages: Any, folder: Path) -> None:
    write_parquet(folder / "a.parquet", [{"prompt_id": "a", "messages": messages}])
    [row], _ = run_published(folder, makes="dialogues")
    assert row["messages"] == TWO


def test_a_column_of_conversations_needs_no_mapping(folder: Path) -> None:
    [row], _ = rows_of(folder, {"id": 7, "conversations": SHAREGPT}, makes="dialogues")
    assert (row["prompt"], row["messages"]) == ("Name a bird.", TWO)


def test_a_question_and_a_system_column_are_read(folder: Path) -> None:
    """As in Intel/orca_dpo_pairs."""
    row = {"system": "Be brief.", "question": SUM, "chosen": FOUR, "rejected": FIVE}
    [pair], _ = rows_of(folder, row, makes="pairs", columns={"prompt": "question"})
    assert pair["chosen"] == [SYSTEM, *conversation(SUM, FOUR)]
    assert pair["rejected"] == [SYSTEM, *conversation(SUM, FIVE)]


def test_prompts_are_read_from_conversations_of_one_message(folder: Path) -> None:
    values = [OSLO, conversation(SUM), json.dumps(conversation(SUM)), OSLO + COLD, "So?"]
    made, counts = rows_of(folder, *({"prompt": value} for value in values), makes="prompts")
    assert [row["prompt"] for row in made] == ["Where is Oslo?", SUM, SUM, "So?"]
    assert counts == {"dropped/a prompt of several messages": 1}


def scored(chosen: Any, rejected: Any) -> Row:
    return {**GOOD, "score_chosen": chosen, "score_rejected": rejected}


def test_scores_that_tie_or_contradict_are_counted_and_dropped_on_request(folder: Path) -> None:
    rows = [scored(7, 7.0), scored(2, 9), scored("2", "9"), scored(9, 2), scored(None, 3)]
    made, counts = rows_of(folder, *rows, makes="pairs")
    assert (len(made), counts) == (5, {"scores tie": 1, "scores contradict the choice": 2})
    made, counts = rows_of(folder, *rows, makes="pairs", ties="drop")
    assert [row["score_chosen"] for row in made] == [9, None]
    assert counts == {"dropped/scores tie": 1, "dropped/scores contradict the choice": 2}


@pytest.mark.parametrize(
    ("value", "score"),
    [(7, 7), ("7.5", 7.5), (float("nan"), None), ("NaN", None), ("n/a", None), (True, None)],
)
def test_a_score_is_a_finite_number_or_none(value: Any, score: float | None, folder: Path) -> None:
    [pair], _ = rows_of(folder, scored(value, 1), makes="pairs")
    assert pair["score_chosen"] == score


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"question": SUM, "chosen": FOUR, "rejected": FIVE},
            "has no column 'prompt', which pairs need; it has chosen, question, rejected; name "
            "another with columns: {prompt: …}",
        ),
        ({"chosen": answers(FOUR), "rejected": answers(FIVE)}, "has no column 'prompt'"),
        ({"prompt": SUM, "chosen": FOUR}, "has no column 'rejected'"),
    ],
)
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_missing_column_is_an_error_before_the_run(
    row: Row, says: str, write: Any, folder: Path
) -> None:
    name = "a.parquet" if write is write_parquet else "a.jsonl"
    write(folder / name, [row])
    with pytest.raises(Permanent, match=says):
        run_published(folder, makes="pairs")
    assert not (folder.parent / "set-artifact").exists()


def test_data_in_an_unreadable_form_is_a_one_line_error_with_a_fix(folder: Path) -> None:
    text = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": text, "chosen": "Hello.", "rejected": "No."}
    with pytest.raises(
        Permanent,
        match=r"\(a conversation as one text 1\), such as row 1 of train.jsonl; convert the texts",
    ):
        rows_of(folder, row, makes="pairs")


def test_ties_is_refused_for_dialogues(folder: Path) -> None:
    with pytest.raises(Permanent, match="ties: dialogues are not pairs; remove ties:"):
        rows_of(folder, {"messages": TWO}, makes="dialogues", ties="drop")


def test_dropping_ties_needs_the_score_columns(folder: Path) -> None:
    row = {**GOOD, "chosen_score": 2, "rejected_score": 9}
    with pytest.raises(
        Permanent,
        match="no column 'score_chosen', and ties: drop needs score_chosen and score_rejected; "
        "it has chosen, chosen_score, .*; name the scores with columns: {score_chosen: …, score_",
    ):
        rows_of(folder, row, makes="pairs", ties="drop")
    with pytest.raises(Permanent, match="no column 'score_rejected', and ties: drop"):
        rows_of(folder, {**row, "score_chosen": 2}, makes="pairs", ties="drop")
    names = {"score_chosen": "chosen_score", "score_rejected": "rejected_score"}
    _, counts = rows_of(
        folder,
        GOOD | row,
        scored(9, 2) | row | {"chosen_score": 10},
        makes="pairs",
        ties="drop",
        columns=names,
    )
    assert counts == {"dropped/scores contradict the choice": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (scored(7, 7), r"\(scores tie 1\), such as row 1 of train.jsonl; set ties: keep$"),
        (
            scored(2, 7),
            r"\(scores contradict the choice 1\), such as .*; set ties: keep, or correct score_",
        ),
    ],
)
def test_dropping_every_pair_is_a_one_line_error_with_a_fix(
    row: Row, says: str, folder: Path
) -> None:
    with pytest.raises(Permanent, match=says):
        rows_of(folder, row, makes="pairs", ties="drop")


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_an_unreadable_first_row_does_not_reject_the_data(write: Any, folder: Path) -> None:
    good = {"chosen": OSLO + " In Norway.", "rejected": OSLO + " Somewhere."}
    name = "a.parquet" if write is write_parquet else "a.jsonl"
    write(folder / name, [{"chosen": "Yes.", "rejected": "No."}, *[good] * 99])
    made, work = run_published(folder, makes="pairs")
    assert (len(made), work.counts["dropped/answers without a prompt"]) == (99, 1)
    work = Work("published", folder.parent / "hub", 0, {}, {}, {})
    work.scratch.mkdir(parents=True)
    Published(makes="pairs", dataset=f"file://{folder}/{name}").run(work)
    assert work.counts["rows"] == 99
