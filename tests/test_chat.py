"""Tests that chat tokens equal those of the saved template, and which of them are trained."""

import copy
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.chat import CHATML, ChatFormat, pad_token_id
from zephyr_ray.errors import Permanent

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name two colours.\n\n1. and 2."},
    {"role": "assistant", "content": "1. Red\n2. Bleu — naïve 🎉"},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Green."},
]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\\n\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chatml(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def byte_tokenizer(special: list[str], **kwargs: Any) -> Any:
    """Returns a tokenizer with one token per byte and the given special tokens; prepends a BOS if
    <s> is one of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    if "<s>" in special:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **kwargs)


@pytest.fixture(scope="module")
def mistral() -> Any:
    return byte_tokenizer(
        ["<unk>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def foreign() -> Any:
    return byte_tokenizer(
        ["<s>", "<|head|>", "<|eot|>", "<|end_of_text|>", "<pad>"],
        bos_token="<s>",
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
        chat_template=LLAMA3,
    )


def trained_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    ids, trained = ChatFormat.of(tokenizer).render(messages)
    return str(tokenizer.decode([token for token, on in zip(ids, trained, strict=True) if on]))


def template_ids(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, **kwargs
    )
    return ids


def test_chatml_tokens_are_the_templates(chatml: Any) -> None:
    assert ChatFormat.of(chatml).render(TALK)[0] == template_ids(chatml, TALK)


def test_chatml_is_saved_as_it_is_trained_whatever_the_tokenizers_own_template_adds(
    chatml: Any,
) -> None:
    """Qwen's and SmolLM2's templates add a system message to conversations without one."""
    own = copy.deepcopy(chatml)
    own.chat_template = "<|im_start|>system\nBe good.<|im_end|>\n" + CHATML
    chat = ChatFormat.of(own)
    assert chat.render(TALK)[0] == template_ids(chat.prepare(), TALK)


def test_chatml_trains_each_answer_and_its_end_token(chatml: Any) -> None:
    answers = [m["content"] + "<|im_end|>" for m in TALK if m["role"] == "assistant"]
    assert trained_text(chatml, TALK) == "".join(answers)


def test_an_answer_ends_at_its_end_token_or_where_training_does(chatml: Any) -> None:
    chat = ChatFormat.of(chatml)
    end = chat.stop_token_id
    ids, trained = [7, 8, end, 9, end, end, 7, 8, 9], [0, 1, 1, 1, 1, 0, 0, 1, 1]
    spans = chat.answers(ids, list(map(bool, trained)))
    assert spans == [range(1, 3), range(3, 5), range(7, 9)]
    assert chat.answers([7], [False]) == chat.answers([], []) == []


def test_chatml_prompt_is_what_the_answer_continues(chatml: Any) -> None:
    chat = ChatFormat.of(chatml)
    prompt = chat.prompt(TALK[:2])
    assert prompt == template_ids(chatml, TALK[:2], add_generation_prompt=True)
    assert chat.render(TALK[:3])[0][: len(prompt)] == prompt


def test_answer_that_opens_with_white_space_still_continues_the_prompt(chatml: Any) -> None:
    talk = [TALK[1], {"role": "assistant", "content": "\n\n  Red"}]
    chat = ChatFormat.of(chatml)
    prompt = chat.prompt(talk[:1])
    assert chat.render(talk)[0][: len(prompt)] == prompt
    assert trained_text(chatml, talk) == "\n\n  Red<|im_end|>"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_typed_special_token_does_not_end_the_turn(chatml: Any, role: str) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk = [{**m, "content": "x<|im_end|>y"} if m["role"] == role else m for m in talk]
    ids, _ = ChatFormat.of(chatml).render(talk)
    assert ids.count(chatml.convert_tokens_to_ids("<|im_end|>")) == len(talk)
    assert "x<|im_end|>y" in chatml.decode(ids)


def test_zephyr_format_with_exactly_one_bos(mistral: Any) -> None:
    chat = ChatFormat.of(mistral)
    ids, _ = chat.render(TALK[:3])
    assert mistral.decode(ids) == (
        "<s><|system|>\nBe brief.</s>\n<|user|>\nName two colours.\n\n1. and 2.</s>\n"
        "<|assistant|>\n1. Red\n2. Bleu — naïve 🎉</s>\n"
    )
    assert ids.count(mistral.bos_token_id) == 1
    assert trained_text(mistral, TALK[:3]) == "1. Red\n2. Bleu — naïve 🎉</s>"


def test_zephyr_template_writes_the_same_tokens(mistral: Any) -> None:
    chat = ChatFormat.of(mistral)
    text = mistral.apply_chat_template(TALK, tokenize=False, chat_template=chat.template)
    assert mistral(text, add_special_tokens=False)["input_ids"] == chat.render(TALK)[0]
    prompt = mistral.apply_chat_template(
        TALK[:2], tokenize=False, add_generation_prompt=True, chat_template=chat.template
    )
    assert mistral(prompt, add_special_tokens=False)["input_ids"] == chat.prompt(TALK[:2])


def test_foreign_template_trains_by_prefix_differences(foreign: Any) -> None:
    ids, _ = ChatFormat.of(foreign).render(TALK)
    assert (
        ids
        == foreign(foreign.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
    )
    assert ids.count(foreign.bos_token_id) == 1
    assert trained_text(foreign, TALK) == "1. Red\n2. Bleu — naïve 🎉<|eot|>Green.<|eot|>"


def test_foreign_stop_token_is_the_one_that_ends_a_turn(foreign: Any) -> None:
    assert ChatFormat.of(foreign).stop_token_id == foreign.convert_tokens_to_ids("<|eot|>")


def test_the_first_of_two_end_tokens_of_a_foreign_template_stops_and_is_trained() -> None:
    """Some templates end the turn and then the text; generation must stop at the first token."""
    tokenizer = byte_tokenizer(
        ["<|head|>", "<|eot|>", "<|end_of_text|>"],
        eos_token="<|end_of_text|>",
        chat_template=LLAMA3.replace("{{ bos_token }}", "").replace(
            "'<|eot|>'", "'<|eot|><|end_of_text|>'"
        ),
    )
    chat = ChatFormat.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.stop_token_id) == "<|eot|>"
    assert trained_text(tokenizer, TALK) == "1. Red\n2. Bleu — naïve 🎉<|eot|>Green.<|eot|>"


def test_foreign_template_that_rewrites_earlier_turns_is_refused(foreign: Any) -> None:
    from copy import deepcopy

    last_only = deepcopy(foreign)
    last_only.chat_template = (
        "{% for m in messages %}{{ '<|head|>' + m['role'] + '\\n\\n' }}"
        "{{ m['content'] if loop.last or m['role'] == 'user' }}{{ '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant\\n\\n' }}{% endif %}"
    )
    with pytest.raises(Permanent, match="earlier turns"):
        ChatFormat.of(last_only).render(TALK)


def test_nothing_to_train_is_an_error(chatml: Any) -> None:
    with pytest.raises(Permanent, match="no assistant message"):
        ChatFormat.of(chatml).render(TALK[:2])


def test_pad_is_never_the_end_token(chatml: Any, mistral: Any) -> None:
    from copy import deepcopy

    assert mistral.convert_ids_to_tokens(pad_token_id(mistral)) == "<unk>"
    same = deepcopy(chatml)
    same.pad_token = same.eos_token
    assert same.convert_ids_to_tokens(pad_token_id(same)) == "<|endoftext|>"
    bare = byte_tokenizer(["</s>"], eos_token="</s>", pad_token="</s>")
    with pytest.raises(Permanent, match="pad"):
        pad_token_id(bare)


def test_prepared_tokenizer_carries_end_pad_and_template(mistral: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ChatFormat.of(mistral).prepare().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.pad_token) == ("</s>", "<unk>")
    assert loaded.apply_chat_template(TALK[:2], tokenize=False).startswith("<s><|system|>\n")


@pytest.mark.parametrize("own_pad", ["<|im_end|>", "<|endoftext|>"])
def test_chatml_ends_with_its_own_token_whatever_the_tokenizer_ends_and_pads_with(
    own_pad: str, tmp_path: Path
) -> None:
    """Base models that have ChatML's tokens may still use an end-of-document token as EOS."""
    from transformers import AutoTokenizer

    base = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
        eos_token="<|endoftext|>",
        pad_token=own_pad,
        chat_template="a template of its own",
    )
    chat = ChatFormat.of(base)
    assert base.convert_ids_to_tokens(chat.stop_token_id) == "<|im_end|>"
    chat.prepare().save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.eos_token, saved.pad_token) == ("<|im_end|>", "<pad>")
    assert saved.chat_template == CHATML


@pytest.mark.parametrize(
    ("own", "name"),
    [
        (None, "ChatML"),
        ("{# as ChatML #}" + CHATML, "ChatML"),
        (
            "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + CHATML,
            "ChatML, not the model's own chat template, which writes other text",
        ),
        (
            "{{ raise_exception('no') }}",
            "ChatML, not the model's own chat template, which writes other text",
        ),
    ],
)
def test_the_name_says_that_the_models_own_template_is_not_used(
    own: str | None, name: str, chatml: Any
) -> None:
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = own
    assert ChatFormat.of(tokenizer).name == name


def test_proof_colors_what_is_trained(chatml: Any) -> None:
    ansi, page = ChatFormat.of(chatml).proof(TALK[1:3] + [{"role": "user", "content": "<b>"}])
    assert "\033[32m1. Red\n2. Bleu — naïve 🎉<|im_end|>\033[0m" in ansi
    assert page.count("#0a7d32") == 1 and "&lt;b&gt;" in page


@pytest.fixture(scope="module", params=["always", "first"])
def llama_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Returns a tokenizer like Llama-2's and Mistral's: BPE over ▁words with byte fallback. It puts
    ▁ before every piece of text between special tokens ("always", as published) or before the
    first only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=request.param, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [m["content"] for m in TALK] + ["<|user|> <|system|> <|assistant|> \n"] * 3
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special + alphabet, show_progress=False),
    )
    inner.add_special_tokens(special)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_zephyrs_format_on_a_tokenizer_like_llamas(llama_tokenizer: Any) -> None:
    """Training, generation, and the saved template, which plain transformers and vLLM use, produce
    the same tokens."""
    chat = ChatFormat.of(llama_tokenizer)
    ids, trained = chat.render(TALK)
    saved = chat.prepare()
    assert ids == template_ids(saved, TALK)
    assert chat.prompt(TALK[:2]) == template_ids(saved, TALK[:2], add_generation_prompt=True)
    assert chat.prompt(TALK[:2]) == ids[: len(chat.prompt(TALK[:2]))]
    assert saved.decode(ids).replace(" ", "").startswith("<s><|system|>\nBebrief.</s>\n<|user|>\n")
    assert sum(trained) and all(
        ids[span[-1]] == saved.eos_token_id for span in chat.answers(ids, trained)
    )
    assert len(chat.answers(ids, trained)) == 2 and ids.count(saved.bos_token_id) == 1
    # dpo and vLLM load the saved tokenizer: its tokens and mask must not change.
    again = ChatFormat.of(saved)
    assert again.render(TALK) == (ids, trained)
    assert again.prompt(TALK[:2]) == chat.prompt(TALK[:2])
