"""Tests that the loss mask is proven: for a template when it is loaded, and for every row."""

from typing import Any

import pytest
from chat_families import FAMILIES, byte_level, llama2, plain, sentencepiece
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

import zephyr_ray.chat.template
from zephyr_ray.chat import ChatFormat
from zephyr_ray.chat.encoder import Encoder
from zephyr_ray.errors import Permanent, RowError

TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]
ADDED = "{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
GOOD = f"{{% for m in messages %}}{ADDED}{{% endfor %}}{ASK}"


def tokenizer_with(template: str) -> Any:
    inner = byte_level(["<|pad|>"])
    inner.add_tokens(plain("<|turn|>", "<|end|>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|pad|>", chat_template=template
    )


def trained_texts(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    chat = ChatFormat.of(tokenizer)
    ids, trained = chat.render(messages)
    return [tokenizer.decode([ids[at] for at in span]) for span in chat.answers(ids, trained)]


ONLY_ANSWER = "('' if m['role'] == 'user' else m['content']) +"
UNMASKABLE = {
    "ignores add_generation_prompt": (GOOD.replace(ASK, ""), "writes '<|turn|>assistant"),
    "asks with another header": (GOOD.replace("assistant\n", "bot\n"), "changes earlier turns"),
    "asks for more than it writes": (GOOD.replace("assistant\n", "assistant\nSo"), "earlier turns"),
    "keeps the last turns only": (GOOD.replace("in messages", "in messages[-2:]"), "earlier turns"),
    "omits earlier answers": (
        GOOD.replace("m['content'] +", "(m['content'] if loop.last or loop.index0 != 1 else '') +"),
        "changes earlier turns",
    ),
    "omits questions": (
        GOOD.replace("m['content'] +", ONLY_ANSWER),
        "omits a message of role user",
    ),
    "omits the last message": (GOOD.replace("in messages", "in messages[:-1]"), "control token"),
    "cuts answers": (GOOD.replace("m['content'] +", "m['content'][:2] +"), "writes 'Tw<"),
    "changes answers": (GOOD.replace("m['content'] +", "m['content'] | upper +"), "writes 'TWO.<"),
    "writes into answers": (GOOD.replace("'<|end|>", "' Bye.<|end|>"), "writes 'Two. Bye."),
    "thinks first": (
        GOOD.replace("m['content'] +", "'<t></t>' + m['content'] +"),
        "writes '<t></t",
    ),
    "never ends answers": (GOOD.replace("<|end|>", ""), "ends answers without a control token"),
    "has no answers": ("<|turn|>hi<|end|>", "control token"),
    "refuses everything": (
        "{{ raise_exception('No,\nnever.') }}",
        "conversation: No, never.; give",
    ),
    "refuses two exchanges": (
        GOOD + "{% if messages[2:] %}{{ raise_exception('one only') }}{% endif %}",
        "refuses the conversation: one only",
    ),
    "is not Jinja": ("{% for m in %}", "refuses the conversation: Expected an expression"),
    "writes to the messages": ("{{ messages.append(messages[0]) }}" + GOOD, "is unsafe"),
    "opens a file": ("{% include '/etc/passwd' %}" + GOOD, "no loader"),
    "reaches for Python": ("{{ ''.__class__.__mro__ }}" + GOOD, "is unsafe"),
    "recurses": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
}


@pytest.mark.parametrize("name", UNMASKABLE)
def test_a_template_that_cannot_be_masked_is_refused_when_it_is_loaded(name: str) -> None:
    template, says = UNMASKABLE[name]
    assert trained_texts(tokenizer_with(GOOD), TALK) == ["Two.<|end|>", "Four.<|end|>"]
    with pytest.raises(Permanent) as refused:
        ChatFormat.of(tokenizer_with(template))
    line = str(refused.value)
    assert says in line and "the chat template" in line and "\n" not in line
    assert line.endswith("; give the model folder another chat template")


def test_a_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zephyr_ray.chat.template, "MAX_SECONDS", 0.05)
    loops = "{% for a in range(9000) %}{% for b in range(900) %}{% endfor %}{% endfor %}"
    with pytest.raises(Permanent, match="wrote nothing in 0.05 seconds"):
        ChatFormat.of(tokenizer_with(loops + GOOD))


def test_a_template_that_cannot_be_masked_can_still_be_asked() -> None:
    """As with reasoning models, whose templates omit the reasoning of earlier answers."""
    template = GOOD.replace("assistant\n'", "assistant\n<think>\n'")
    tokenizer = tokenizer_with(template)
    chat = ChatFormat.to_ask(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.stop_token_id) == "<|end|>"
    text = (
        "<|turn|>user\nOne?<|end|>\n<|turn|>assistant\nTwo.<|end|>\n<|turn|>user\nThree?<|end|>\n"
    )
    assert tokenizer.decode(chat.prompt(TALK[:3])) == f"{text}<|turn|>assistant\n<think>\n"
    with pytest.raises(RowError, match="changes earlier turns"):
        chat.render(TALK)


def test_text_after_the_last_end_token_may_differ() -> None:
    """As in Phi-3's template, which ends a whole conversation."""
    template = GOOD.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    assert trained_texts(tokenizer_with(template), TALK) == ["Two.<|end|>", "Four.<|end|>"]


def test_a_conversation_that_the_template_refuses_is_the_rows_fault() -> None:
    refusal = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}"
    )
    tokenizer = tokenizer_with(refusal + GOOD)
    tokenizer.name_or_path = "/srv/models/one"  # a path that clients of a service must not see
    chat = ChatFormat.of(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, *TALK]
    for use in (chat.render, chat.prompt):
        with pytest.raises(
            RowError, match="^the chat template refuses the conversation: no system$"
        ):
            use(messages)


def test_a_message_that_the_template_omits_is_the_rows_fault() -> None:
    template = GOOD.replace("m in messages", "m in messages if m['role'] != 'system'")
    chat = ChatFormat.of(tokenizer_with(template))
    with pytest.raises(RowError, match="omits a message of role system"):
        chat.render([{"role": "system", "content": "Be brief."}, *TALK])


def test_a_template_that_ends_long_answers_differently_is_the_rows_fault() -> None:
    other = "('<|turn|>' if m['content'] | length > 20 else '<|end|>') + '\n'"
    template = GOOD.replace("'<|end|>\n'", other)
    chat = ChatFormat.of(tokenizer_with(template))
    with pytest.raises(RowError):
        chat.render([TALK[0], {"role": "assistant", "content": "Two is what comes after one."}])


def test_an_answer_that_the_template_changes_is_the_rows_fault() -> None:
    template = GOOD.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
    chat = ChatFormat.of(tokenizer_with(template))
    messages = [TALK[0], {"role": "assistant", "content": "Well.</think>Two."}]
    with pytest.raises(RowError, match="writes 'Two.<.* instead of the answer 'Well.</think>Two.'"):
        chat.render(messages)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda head, answer: (head, answer[1:]),  # the start is lost
        lambda head, answer: (head, [*answer[:-2], answer[-1]]),  # the last token is lost
        lambda head, answer: (head, answer[:-1]),  # the end token is lost
        lambda head, answer: (head[:-1], [head[-1], *answer]),  # part of the header is trained
        lambda head, answer: (head, answer + answer),
        lambda head, answer: (head + answer, []),
        lambda head, answer: (head, [answer[0], answer[-1], *answer[1:]]),  # ends in the middle
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_wrong_mask_gets_past_the_proof(
    wrong: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat.of(FAMILIES[family]())
    encode_turn = Encoder.encode_turn
    monkeypatch.setattr(Encoder, "encode_turn", lambda *a: wrong(*encode_turn(*a)))
    with pytest.raises(RowError, match=" trained"):
        chat.render([TALK[0], {"role": "assistant", "content": "Say it, two"}])


def test_a_token_for_unknown_text_is_never_trained() -> None:
    inner = sentencepiece(["<unk>", "<s>", "</s>"])
    inner.model.byte_fallback = False
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    chat = ChatFormat.of(tokenizer)
    with pytest.raises(RowError, match="'Two <unk></s>' would be trained instead of 'Two ☃'"):
        chat.render([TALK[0], {"role": "assistant", "content": "Two ☃"}])


def test_tokens_that_strip_whitespace_do_not_shift_the_mask() -> None:
    """As in Phi-3: Llama 2's tokens, and some that remove the whitespace after them."""
    inner = llama2().backend_tokenizer
    tokens = ("<|turn|>", "<|end|>")
    inner.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in tokens])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", chat_template=GOOD
    )
    assert ["".join(text.split()) for text in trained_texts(tokenizer, TALK)] == [
        "Two.<|end|>",
        "Four.<|end|>",
    ]
