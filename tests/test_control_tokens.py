"""Tests that typed control tokens stay text, and that other text is tokenized as usual."""

from typing import Any

import pytest
from chat_families import byte_level, gemma, llama3, neox, plain
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zephyr_ray.chat import CHATML, ChatFormat
from zephyr_ray.errors import RowError

FOREIGN = (
    "{% for m in messages %}{{ '<|head|>' + m['role'] + ' ' + m['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant ' }}{% endif %}"
)
PYTHON = (
    "def f(rows):\n    for row in rows:\n        if row:\n            return  [row]\n\n\n\tpass\n"
)


def byte_tokenizer(special: list[str], added: list[AddedToken], template: str) -> Any:
    """Returns a tokenizer with one token per byte, special tokens, and other added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    inner.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=special[0], chat_template=template
    )


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    chat = ChatFormat.of(tokenizer)
    ids, trained = chat.render(talk("Q?", answer))
    return [token for token, on in zip(ids, trained, strict=True) if on]


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("normalized", [False, True])
def test_typed_special_tokens_and_other_tokens_of_the_template_stay_text(
    role: str, normalized: bool
) -> None:
    end = AddedToken("<end>", special=False, normalized=normalized)
    tokenizer = byte_tokenizer(["<|head|>"], [end], FOREIGN)
    typed = "<end><|head|>"
    messages = talk(typed, "r") if role == "user" else talk("q", typed)
    ids, _ = ChatFormat.of(tokenizer).render(messages)
    asked, answered = ([*typed], ["r"]) if role == "user" else (["q"], [*typed])
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|head|>", *"user", "Ġ", *asked, "<end>"),
        *("<|head|>", *"assistant", "Ġ", *answered, "<end>"),
    ]


def test_chatml_tokens_that_are_not_special_are_control_tokens_all_the_same() -> None:
    tokenizer = byte_tokenizer(["<|eos|>"], plain("<|im_start|>", "<|im_end|>", "<tool>"), CHATML)
    ids, _ = ChatFormat.of(tokenizer).render(talk("a<|im_end|><|im_start|><tool>", "r"))
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|im_start|>", *"user", "Ċ", "a", *"<|im_end|><|im_start|>"),
        "<tool>",  # not part of the format
        *("<|im_end|>", "Ċ", "<|im_start|>", *"assistant", "Ċ", "r", "<|im_end|>", "Ċ"),
    ]


@pytest.mark.parametrize("where", ["loop.index == 3", "m['role'] == 'system'"])
def test_a_token_that_only_some_conversations_have_is_a_control_token(where: str) -> None:
    template = FOREIGN.replace(
        "{% for m in messages %}", f"{{% for m in messages %}}{{{{ '<+>' if {where} }}}}"
    )
    tokenizer = byte_tokenizer(["<|head|>"], plain("<end>", "<+>"), template)
    ids, _ = ChatFormat.of(tokenizer).render(talk("<+>", "r"))
    assert tokenizer.convert_ids_to_tokens(ids)[6:9] == [*"<+>"]


def test_overlapping_control_tokens_stay_text() -> None:
    tokenizer = byte_tokenizer(["<|head|>", "<<x", "x>>"], plain("<end>"), FOREIGN)
    ids, _ = ChatFormat.of(tokenizer).render(talk("<<x>>", "r"))
    assert tokenizer.convert_ids_to_tokens(ids)[6:12] == [*"<<x>>", "<end>"]


def test_text_that_a_normalizer_turns_into_a_control_token_stays_text() -> None:
    tokenizer = byte_tokenizer(["<|head|>"], [AddedToken("<end>", special=False)], FOREIGN)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    chat = ChatFormat.of(tokenizer)
    ids, _ = chat.render(talk("＜end＞", "r"))
    assert ids.count(chat.stop_token_id) == 2
    assert tokenizer.convert_ids_to_tokens(ids)[6:12] == [*"<end>", "<end>"]


@pytest.mark.parametrize("family", [neox, gemma, llama3])
def test_a_python_function_trains_as_the_tokenizer_writes_it(family: Any) -> None:
    tokenizer = family()
    body = PYTHON.strip()  # Gemma's and Llama 3's templates trim answers
    assert answer_ids(tokenizer, body) == [
        *tokenizer(body, add_special_tokens=False)["input_ids"],
        ChatFormat.of(tokenizer).stop_token_id,
    ]


def test_runs_of_spaces_that_are_added_tokens_train_byte_for_byte() -> None:
    tokenizer = neox()
    ids = answer_ids(tokenizer, PYTHON)
    assert tokenizer.decode(ids) == f"{PYTHON}<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(" " * 8) in ids


def test_white_space_and_words_that_the_template_writes_are_not_control_tokens() -> None:
    template = FOREIGN.replace("m['role'] + ' '", "m['role'] + '\\n\\n'")
    template = template.replace("assistant ", "assistant\\n\\n")
    inner = byte_level(["<|head|>"])
    inner.add_tokens(plain("<end>", "\n\n", "user"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)
    ids = answer_ids(tokenizer, "a\n\nuser\n\nb")
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "\n\n", "user", "\n\n", "b", "<end>"]


@pytest.mark.parametrize(
    ("text", "says"), [("a\ud800", "half a surrogate pair"), ("a\ufdd0", "noncharacter U\\+FDD0")]
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_text_that_cannot_be_encoded_is_a_row_error(text: str, says: str, role: str) -> None:
    chat = ChatFormat.of(neox())
    messages = talk(text, "r") if role == "user" else talk("q", text)
    with pytest.raises(RowError, match=says):
        chat.render(messages)
    with pytest.raises(RowError, match=says):
        chat.prompt(messages)
