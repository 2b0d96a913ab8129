"""The same text yields the same tokens in sft, dpo, evaluation and serving, for any family."""

import asyncio
import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import train_once
from chat_families import FAMILIES

from zephyr_ray.chat import ZEPHYR, ChatFormat
from zephyr_ray.engines.vllm import VllmEngine
from zephyr_ray.models.contract import Sampling
from zephyr_ray.serve.dispatcher import Dispatcher
from zephyr_ray.serve.request_error import RequestError
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

Messages = list[dict[str, str]]
TEXTS = {
    "plain": "Green.",
    "line breaks first": "\n\nGreen.",
    "whitespace first": "  \n\n\tGreen.",
    "spaces at the end": "Green. \n  ",
    "code": "def f(a):\n    for row in a:\n        return  [row]\n\n\n\t\tpass",
    "control tokens": "<|im_end|></s><|eot_id|><end_of_turn><|endoftext|>[/INST]<|user|>\nx",
    "scripts": "日本語 🎉 naïve שלום",
    "combining": "e\u0301\u0301 \u1100\u1161 ﬁ",
    "control characters": "a\x00b\x01\x7f\r\nc",
    "nothing": "",
    "a line break": "\n",
    "a long word": "abcde9" * 2000,
}


class Stop(Exception):
    """Ends a call, and carries the tokens that the engine was given."""


@cache
def load(family: str) -> Any:
    return FAMILIES[family]()


def conversation(text: str) -> Messages:
    """Returns a conversation with the text as question, earlier answer and last answer."""
    roles = ("user", "assistant", "user", "assistant")
    contents = (text or "?", text, "More?", text)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


def sft_row(chat: ChatFormat, messages: Messages) -> dict[str, list[int]]:
    stage = Sft(model="base", data="data", max_length=1 << 20)
    return train_once.tokens(stage, chat, {"id": "r", "messages": messages})


def dpo_row(chat: ChatFormat, messages: Messages) -> dict[str, list[int]]:
    other = [*messages[:-1], {"role": "assistant", "content": "another answer"}]
    stage = Dpo(model="base", data="data", max_length=1 << 20)
    return train_once.tokens(stage, chat, {"id": "r", "chosen": messages, "rejected": other})


def evaluated_prompt(chat: ChatFormat, messages: Messages, monkeypatch: Any) -> list[int]:
    def add_request(number: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        assert sampling["stop_token_ids"] == [chat.stop_token_id]
        raise Stop(prompt["prompt_token_ids"])

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    engine = VllmEngine.__new__(VllmEngine)
    engine.format, engine.context = chat, 1 << 20
    engine._waiting, engine._listeners, engine._numbers = {}, {}, iter(range(1))
    engine._engine = SimpleNamespace(add_request=add_request)
    with pytest.raises(Stop) as given:
        asyncio.run(engine.answer(messages, Sampling(temperature=1, top_p=1, max_tokens=8)))
    return given.value.args[0]


def served_prompt(chat: ChatFormat, messages: Messages) -> list[int]:
    async def respond(request: Any, method: str, protocol: Any, settings: Any, name: str) -> None:
        assert settings["stop_token_ids"] == [chat.stop_token_id]
        raise Stop(settings["kv_transfer_params"]["prompt_token_ids"])

    dispatcher = Dispatcher.__new__(Dispatcher)
    dispatcher._chat_formats, dispatcher._handles = {"m": chat}, {"m": None}
    dispatcher._max_tokens, dispatcher._respond = 8, respond
    dispatcher._protocol = SimpleNamespace(ChatCompletionRequest=None)
    body = json.dumps({"model": "m", "messages": messages}).encode()
    with pytest.raises(Stop) as given:
        asyncio.run(dispatcher.chat(body, "r"))
    return given.value.args[0]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_evaluation_and_serving_use_the_same_tokens(
    family: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat.of(load(family))
    messages = conversation(TEXTS[text])
    row, pair = sft_row(chat, messages), dpo_row(chat, messages)
    prompt = pair["prompt_ids"]
    tokens = prompt + pair["chosen_ids"]
    assert tokens == row["input_ids"][: len(tokens)]
    assert pair["chosen_ids"] == row["labels"][len(prompt) : len(tokens)]
    assert prompt == evaluated_prompt(chat, messages[:-1], monkeypatch)
    assert prompt == served_prompt(chat, messages[:-1])
    # No text becomes a control token: there are as many as in an ordinary conversation.
    ends = sft_row(chat, conversation("x"))["input_ids"].count(chat.stop_token_id)
    assert row["input_ids"].count(chat.stop_token_id) == ends


def test_a_request_that_the_template_refuses_is_the_clients_fault() -> None:
    dispatcher = Dispatcher.__new__(Dispatcher)
    dispatcher._chat_formats, dispatcher._handles = {"m": ChatFormat.of(load("gemma"))}, {"m": None}
    dispatcher._max_tokens = 8
    messages = [{"role": "system", "content": "Be brief."}, *conversation("x")[:1]]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    with pytest.raises(RequestError, match="System role not supported") as refused:
        asyncio.run(dispatcher.chat(body, "r"))
    assert (refused.value.status, refused.value.param) == (400, "messages")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_read_back_with_the_same_tokens(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat = ChatFormat.of(FAMILIES[family]())
    rows = [conversation(text) for text in TEXTS.values()]
    before = [(chat.render(row), chat.prompt(row[:-1])) for row in rows]
    chat.prepare().save_pretrained(tmp_path)
    again = ChatFormat.of(AutoTokenizer.from_pretrained(tmp_path))
    assert [(again.render(row), again.prompt(row[:-1])) for row in rows] == before
    assert again.stop_token_id == chat.stop_token_id
    assert again.prepare().chat_template == chat.tokenizer.chat_template


def test_a_model_saved_by_an_earlier_version_is_read_back_with_the_same_tokens() -> None:
    """Such versions saved Zephyr's template with `true` or `false` in place of `add_bos`."""
    tokenizer = FAMILIES["zephyr"]()
    rows = [conversation(text) for text in TEXTS.values()]
    before = [ChatFormat.of(tokenizer).render(row) for row in rows]
    tokenizer.chat_template = ZEPHYR.replace("add_bos", "true", 1)
    tokenizer.pad_token = "<unk>"
    assert [ChatFormat.of(tokenizer).render(row) for row in rows] == before


def test_a_template_that_writes_tokens_by_name_is_saved_with_the_tokens_it_wrote(
    tmp_path: Path,
) -> None:
    """The saved `eos_token` is the token that ends an answer, not the former `eos_token`."""
    from transformers import AutoTokenizer

    tokenizer = FAMILIES["llama3"]()
    template = "\n" + tokenizer.chat_template.replace("'<|eot_id|>'", "'<|eot_id|>' + eos_token")
    tokenizer.chat_template = template
    chat = ChatFormat.of(tokenizer)
    before = chat.render(conversation("Green."))
    chat.prepare().save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.eos_token == "<|eot_id|>"
    assert ChatFormat.of(saved).render(conversation("Green.")) == before
