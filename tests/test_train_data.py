"""Tests how training prepares rows: tokens, packing, batches and their order; without Ray."""

import re
from pathlib import Path
from typing import Any

import pytest
import train_once
from train_once import prepare

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.stage import Work
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.model import load_chat, load_model
from zephyr_ray.train.pair_stage import answer
from zephyr_ray.train.sft import Sft


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return load_chat(str(tiny_model))


def talk(*texts: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def pair(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> dict[str, Any]:
    return {"id": "p", "chosen": chosen, "rejected": rejected}


@pytest.fixture
def work(tmp_path: Path, tiny_model: Path) -> Work:
    return train_once.work_for(tmp_path, tiny_model, [])


def order(seed: int, epochs: int = 3) -> list[list[int]]:
    """Returns the order of 20 rows, per epoch."""
    stage = Sft(model="base", data="data", global_batch=1, epochs=epochs, seed=seed)
    rows = stage.order(20)
    return [rows[at : at + 20] for at in range(0, len(rows), 20)]


def test_order_fills_whole_steps_and_shows_every_row() -> None:
    stage = Sft(model="base", data="data", global_batch=4, epochs=1, seed=3)
    rows = stage.order(6)
    assert len(rows) == 8 and set(rows) == set(range(6))


def test_every_epoch_shows_every_row_in_its_own_order() -> None:
    epochs = order(seed=0)
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, list(range(20))]}) == 4


def test_the_seed_determines_the_order() -> None:
    assert order(seed=1) == order(seed=1) != order(seed=2)


def test_the_end_token_of_a_cut_off_answer_is_not_trained(chat: ChatFormat, work: Work) -> None:
    rows = [{"id": "r", "messages": talk("a", "b", "a", "b"), "finish": ["length", "stop"]}]
    [row] = prepare(Sft(model="base", data="data", packing=False), work, rows)
    ends = [label for label in row["labels"] if label == chat.stop_token_id]
    assert row["input_ids"].count(chat.stop_token_id) == 4 and len(ends) == 1
    assert row["labels"].index(chat.stop_token_id) > len(row["labels"]) // 2


def test_truncation_is_counted_and_an_empty_row_dropped(chat: ChatFormat, work: Work) -> None:
    long, answer = "stone " * 60, "old " * 60
    rows = [
        {"id": "cut", "messages": talk("a", answer)},
        {"id": "lost", "messages": talk(long, answer)},
    ]
    stage = Sft(model="base", data="data", packing=False, max_length=32)
    assert prepare(stage, work, rows).lengths.tolist() == [32]
    assert work.counts["truncated"] == 2
    assert work.counts["dropped/truncated_to_nothing"] == 1
    assert work.examples["dropped/truncated_to_nothing"] == ["lost"]


@pytest.mark.parametrize(("missing", "truncated"), [(0, 0), (1, 1)])
def test_a_dialogue_of_max_length_is_kept_whole(
    missing: int, truncated: int, chat: ChatFormat, work: Work
) -> None:
    messages = talk("a", "one two three four five six seven")
    ids, _ = chat.render(messages)
    length = len(ids) - missing
    stage = Sft(model="base", data="data", max_length=length)
    [row] = prepare(stage, work, [{"id": "r", "messages": messages}])
    assert row["input_ids"] == ids[:length] and work.counts["truncated"] == truncated


@pytest.mark.parametrize(("packing", "lengths"), [({}, [2, 2, 1]), ({"packing": False}, [1] * 5)])
def test_dialogues_fill_sequences_of_max_length_by_default(
    packing: dict[str, bool], lengths: list[int], chat: ChatFormat, work: Work
) -> None:
    rows = [{"id": str(n), "messages": talk("a", "one two three four five")} for n in range(5)]
    length = len(chat.render(rows[0]["messages"])[0])
    stage = Sft(model="base", data="data", max_length=2 * length + 1, **packing)
    data = prepare(stage, work, rows)
    assert data.lengths.tolist() == [length * dialogues for dialogues in lengths]
    assert (work.counts["rows"], work.counts["sequences"]) == (5, len(lengths))
    fill = {"packing_fill": 5 / 3 * length / (2 * length + 1)} if not packing else {}
    assert {k: v for k, v in work.counts.items() if k == "packing_fill"} == pytest.approx(fill)


def test_the_seed_shuffles_dialogues_before_packing(chat: ChatFormat, work: Work) -> None:
    rows = [{"id": word, "messages": talk("a", word)} for word in "bcdefghijk"]
    length = len(chat.render(rows[0]["messages"])[0])

    def packed(seed: int) -> list[list[int]]:
        stage = Sft(model="base", data="data", max_length=2 * length, seed=seed)
        data = prepare(stage, work, rows)
        assert data.lengths.tolist() == [2 * length] * 5
        return [row["input_ids"] for row in data]

    assert packed(1) == packed(1) != packed(2)


def test_packed_dialogues_do_not_attend_to_each_other(
    chat: ChatFormat, work: Work, tiny_model: Path
) -> None:
    import torch

    stage = Sft(model="base", data="data", max_length=512)
    [row] = prepare(stage, work, train_once.dialogues(3))
    model = load_model(str(tiny_model))
    objective = stage.objective()
    inputs = objective.inputs(objective.collator(pad_token_id=0, model=model)([row]))
    with torch.no_grad():
        # No KV cache, as in training: with one, transformers treats the row as a single text.
        packed = model(**inputs, use_cache=False).logits[0]
        dialogues = torch.tensor(row["input_ids"]).split(row["seq_lengths"])
        alone = torch.cat([model(ids[None]).logits[0] for ids in dialogues])
    assert len(dialogues) == 3 and (packed - alone).abs().max() < 1e-4


def test_a_cut_off_answer_has_no_end_token_in_dpo(chat: ChatFormat) -> None:
    ask, reply = talk("a", "b c")
    prompt, whole = answer(chat, [ask, reply | {"finish_reason": "stop"}])
    assert answer(chat, [ask, reply | {"finish_reason": "length"}]) == (prompt, whole[:-1])
    assert whole[-1] == chat.stop_token_id


def test_dpo_trains_the_last_answer_of_a_conversation(chat: ChatFormat) -> None:
    prompt, trained = answer(chat, talk("a", "first", "b", "last"))
    assert prompt == chat.prompt(talk("a", "first", "b"))
    assert chat.tokenizer.decode(trained) == "last<|im_end|>"


def test_long_answers_are_cut_at_the_end_to_keep_the_prompt(chat: ChatFormat, work: Work) -> None:
    prompt, chosen = answer(chat, talk("ask", "one two three four five six"))
    _, rejected = answer(chat, talk("ask", "nine ten"))
    room = 3
    assert len(rejected) > room  # so that both are truncated
    stage = Dpo(model="base", data="data", max_length=len(prompt) + room)
    rows = [pair(talk("ask", "one two three four five six"), talk("ask", "nine ten"))]
    [row] = prepare(stage, work, rows)
    assert row["prompt_ids"] == prompt
    assert (row["chosen_ids"], row["rejected_ids"]) == (chosen[:room], rejected[:room])
    assert work.counts["truncated"] == 1


def test_a_pair_of_max_length_is_kept_whole(chat: ChatFormat, work: Work) -> None:
    prompt, chosen = answer(chat, talk("ask", "one two three four five six"))
    stage = Dpo(model="base", data="data", max_length=len(prompt) + len(chosen))
    rows = [pair(talk("ask", "one two three four five six"), talk("ask", "nine"))]
    [row] = prepare(stage, work, rows)
    assert row["chosen_ids"] == chosen and work.counts["truncated"] == 0


def test_a_prompt_that_leaves_no_room_is_dropped(chat: ChatFormat, work: Work) -> None:
    ask = "one two three four five six seven eight nine ten"
    stage = Dpo(model="base", data="data", max_length=len(chat.prompt(talk(ask))))
    rows = [pair(talk(ask, "a"), talk(ask, "b")), pair(talk("ask", "a"), talk("ask", "b"))]
    assert len(prepare(stage, work, rows)) == 1
    assert work.examples == {"dropped/prompt_fills_max_length": ["p"]}


def test_a_stage_stops_if_most_rows_are_truncated_to_nothing(chat: ChatFormat, work: Work) -> None:
    long = "stone " * 60
    rows = [{"id": f"r{n}", "messages": talk(long if n else "a", "b")} for n in range(3)]
    stage = Sft(model="base", data="data", max_length=32)
    with pytest.raises(Permanent) as raised:
        prepare(stage, work, rows)
    assert str(raised.value) == (
        "stage 'train': 2 of 3 rows have nothing to train within max_length 32 "
        "(truncated_to_nothing 2), such as 'r1'; raise train.max_length, or correct the rows"
    )


def test_bad_rows_have_a_limit(chat: ChatFormat, work: Work) -> None:
    """One of 20 rows may be bad, two may not."""
    rows = [{"id": f"r{n}", "messages": talk("a", "b")} for n in range(19)]
    bad = {"id": "bad", "messages": talk("a")}
    stage = Sft(model="base", data="data")
    prepare(stage, work, [bad, *rows])
    work.counts.clear()
    with pytest.raises(Permanent, match=r"2 of 20 rows .* \(10%: bad_rows 2\).* 'bad_rows': bad: "):
        prepare(stage, work, [bad, bad, *rows[1:]])


def test_an_answer_that_begins_with_line_breaks_trains_as_in_sft(
    chat: ChatFormat, work: Work
) -> None:
    chosen, rejected = talk("ask", "\n\nThe Oder."), talk("ask", "No.")
    [row] = prepare(Dpo(model="base", data="data"), work, [pair(chosen, rejected)])
    [dialogue] = prepare(Sft(model="base", data="data"), work, [{"id": "d", "messages": chosen}])
    length = len(row["prompt_ids"] + row["chosen_ids"])
    assert row["prompt_ids"] + row["chosen_ids"] == dialogue["input_ids"][:length]
    assert row["prompt_ids"] == chat.prompt(chosen[:1])
    assert chat.tokenizer.decode(row["chosen_ids"]) == "\n\nThe Oder.<|im_end|>"


BAD_PAIRS = {
    "two different prompts": (talk("ask", "one"), talk("other", "two")),
    "chosen and rejected must each end with an assistant message": (talk("ask"), talk("ask")),
    "a message is not valid Unicode: it has half a surrogate pair": (
        talk("ask", "one\ud800"),
        talk("ask", "two"),
    ),
}
BAD_DIALOGUES = {
    "a conversation has no assistant message to train on": talk("a"),
    "a message is not valid Unicode: it has half a surrogate pair": talk("a\udfff", "b"),
    "a message contains the noncharacter U+FDD0": talk("a", "b\ufdd0"),
}


def bad_rows() -> list[Any]:
    dialogues = [
        (Sft(model="base", data="data"), {"id": "p", "messages": messages}, says)
        for says, messages in BAD_DIALOGUES.items()
    ]
    pairs = [(Dpo(model="base", data="data"), pair(*p), says) for says, p in BAD_PAIRS.items()]
    return [*dialogues, *pairs]


def good_row(stage: Sft | Dpo, number: int) -> dict[str, Any]:
    if isinstance(stage, Sft):
        return {"id": f"good{number}", "messages": talk("a", "b")}
    return pair(talk("a", "b"), talk("a", "c")) | {"id": f"good{number}"}


@pytest.mark.parametrize(("stage", "bad", "says"), bad_rows())
def test_a_bad_row_is_dropped_and_counted_or_stops_the_stage(
    stage: Any, bad: dict[str, Any], says: str, chat: ChatFormat, work: Work
) -> None:
    work.max_failed = 0.5
    rows = [bad, good_row(stage, 1), bad | {"id": "q"}, good_row(stage, 2)]
    assert len(prepare(stage, work, rows)) in (1, 2)  # dialogues are packed
    assert (work.counts["rows"], work.counts["dropped/bad_rows"]) == (2, 2)
    assert work.examples["dropped/bad_rows"] == [f"p: {says}", f"q: {says}"]
    stop = stage.model_copy(update={"bad_rows": "stop"})
    line = re.escape(f"row 'p' of 'data': {says}; correct it, or set bad_rows: drop")
    with pytest.raises(Permanent, match=f"^{line}$"):
        prepare(stop, work, rows)


@pytest.mark.parametrize(("stage", "bad", "says"), bad_rows())
def test_a_stage_whose_rows_are_all_bad_stops(
    stage: Any, bad: dict[str, Any], says: str, chat: ChatFormat, work: Work
) -> None:
    line = re.escape(f"row 'p' of 'data': {says}; no row is left to train on")
    with pytest.raises(Permanent, match=f"^{line}$"):
        prepare(stage, work, [bad, bad])


def test_the_first_row_with_a_mask_is_shown(chat: ChatFormat) -> None:
    rows = [{"id": "p", "messages": talk("a")}, {"id": "q", "messages": talk("a", "shown")}]
    ansi, page = Sft(model="base", data="data")._first_proof(chat, rows)
    assert "shown<|im_end|>" in ansi and "shown" in page


@pytest.mark.parametrize("rejected", ["one two three four", "one two three five"])
def test_answers_that_are_equal_once_truncated_are_dropped(
    rejected: str, chat: ChatFormat, work: Work
) -> None:
    prompt, _ = answer(chat, talk("ask", "one"))
    common = len(chat.tokenizer("one two three", add_special_tokens=False)["input_ids"])
    stage = Dpo(model="base", data="data", max_length=len(prompt) + common)
    rows = [pair(talk("ask", "one two three four"), talk("ask", rejected))]
    rows.append(pair(talk("ask", "one"), talk("ask", "two")))
    assert len(prepare(stage, work, rows)) == 1
    assert work.examples == {"dropped/same_or_empty_answers": ["p"]}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora": {"quantized": True}, "zero": 2}, "lora.quantized needs a GPU: set gpus_per"),
        ({"optimizer": "paged_adamw_32bit"}, "optimizer: paged_adamw_32bit needs a GPU"),
        ({"lora": {"quantized": True}, "gpus_per_worker": 1}, "4-bit weights; set zero: 2"),
        (
            {"offload": "optimizer", "zero": 0},
            "offload: optimizer does not work with zero: 0; set zero: 2",
        ),
        ({"offload": "all", "zero": 2}, "offload: all does not work with zero: 2; set zero: 3"),
        (
            {"global_batch": 3, "workers": 4},
            "global_batch 3 has no row for each of 4 workers; set workers: 3",
        ),
    ],
)
def test_incompatible_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(Permanent, match=says):
        Sft(model="base", data="data", **settings).check({}, {})


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        (
            Sft(model="base", data="data", micro_batch=4, max_length=512),
            "micro_batch 4 is less than the 512 tokens of the longest row; it counts tokens: for 4 "
            "rows of 512 tokens, write 2048",
        ),
        (
            Dpo(model="base", data="data", micro_batch=1023, max_length=512),
            "micro_batch 1023 is less than the 1024 tokens of the longest row; it counts tokens: "
            "for one row of 1024 tokens, write 1024",
        ),
    ],
)
def test_a_micro_batch_below_a_row_is_refused(stage: Sft | Dpo, line: str) -> None:
    with pytest.raises(Permanent, match=f"^{line}$"):
        stage.check({}, {})
    stage.model_copy(update={"micro_batch": int(line.split()[-1])}).check({}, {})
