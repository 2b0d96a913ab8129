"""Builds small tokenizers of the common families, each with its chat template."""

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Name two colours that go well together, and say why.",
    "def answer(text):\n    for line in text.split():\n\t\treturn [line]\n",
    "1. Red\n2. Blue — naïve 日本語 🎉\n\nThat is all; isn't it?",
    "One? Two. Three? Four. user assistant system model",
]
WORDS = [word for text in TEXTS for word in text.split()]
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's template ignores add_generation_prompt, and an answer has no header."""
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
OPEN_ASSISTANT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}{% else %}"
    "{{ '<|prompter|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""OpenAssistant's template for Pythia: an answer starts right after a control token."""
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(special: list[str]) -> Tokenizer:
    """Returns a BPE tokenizer over ▁words with byte fallback and the special tokens."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    # Words only: the published vocabularies have no token with a line break and letters.
    words = [word for text in TEXTS for word in text.split()]
    inner.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    content = json.loads(inner.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    inner = Tokenizer.from_str(json.dumps(content))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


def byte_level(special: list[str], split: str | None = None) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    inner.pre_tokenizer = level
    if split:
        own = pre_tokenizers.Split(Regex(split), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([own, level])
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        # Teaches merges of line breaks and spaces, which may join a prompt's end to an answer.
        [*TEXTS, *["\n\n\n  \n\n   \t\t"] * 9],
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return inner


def plain(*tokens: str) -> list[AddedToken]:
    """Returns added tokens that are not marked as special."""
    return [AddedToken(token, special=False, normalized=False) for token in tokens]


def llama2() -> Any:
    inner = sentencepiece(["<unk>", "<s>", "</s>"])
    inner.pre_tokenizer = None
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=LLAMA2,
    )


def zephyr() -> Any:
    inner = sentencepiece(["<unk>", "<s>", "</s>"])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama3() -> Any:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    inner = byte_level([*special, "<|eot_id|>", "<|finetune_right_pad_id|>"], LLAMA3_SPLIT)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        chat_template=LLAMA3,
    )


def chatml() -> Any:
    """Returns a tokenizer with ChatML's tokens added as plain ones, and Qwen2's NFC normalizer."""
    inner = byte_level(["<|endoftext|>", "<pad>"])
    inner.normalizer = normalizers.NFC()
    inner.add_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<pad>"
    )


def gemma() -> Any:
    inner = sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>"])
    inner.pre_tokenizer = None
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.add_tokens(plain("<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n", "\t\t", "<b>"))
    inner.add_tokens(plain("▁▁", "▁▁▁▁"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=GEMMA,
    )


def neox() -> Any:
    inner = byte_level(["<|endoftext|>", "<|padding|>"])
    inner.normalizer = normalizers.NFC()
    inner.add_tokens([AddedToken(" " * n, special=False) for n in range(2, 9)])
    inner.add_tokens(plain("<|prompter|>", "<|assistant|>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|padding|>",
        chat_template=OPEN_ASSISTANT,
    )


FAMILIES = {
    "llama2": llama2,
    "zephyr": zephyr,
    "llama3": llama3,
    "chatml": chatml,
    "gemma": gemma,
    "neox": neox,
}
