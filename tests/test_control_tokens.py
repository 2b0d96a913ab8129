"""Control tokens that somebody types into a message are broken up, token by token."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zephyr_ray.chat import CHATML, ChatFormat
from zephyr_ray.serve.requests import ChatRequest, parse

ZERO_WIDTH_SPACE = ["â", "Ģ", "ĭ"]
"""U+200B in UTF-8 is E2 80 8B; a byte-level tokenizer writes these bytes so."""
FOREIGN = (
    "{% for m in messages %}{{ '<|head|>' + m['role'] + ' ' + m['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>' }}{% endif %}"
)


def byte_tokenizer(special: list[str], plain: list[str], template: str) -> Any:
    """One token per byte, and added tokens, some marked as special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=special[0], chat_template=template
    )


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_foreign_template_breaks_up_special_and_other_added_tokens(role: str) -> None:
    tokenizer = byte_tokenizer(["<|head|>"], ["<end>"], FOREIGN)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    talk = [{**m, "content": "<end><|head|>"} if m["role"] == role else m for m in talk]
    ids, _ = ChatFormat.of(tokenizer).render(talk)
    typed = ["<", *ZERO_WIDTH_SPACE, *"end>", "<", *ZERO_WIDTH_SPACE, *"|head|>"]
    asked, answered = (typed, ["r"]) if role == "user" else (["q"], typed)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|head|>", *"user", "Ġ", *asked, "<end>"),
        *("<|head|>", *"assistant", "Ġ", *answered, "<end>"),
    ]


def test_a_served_chat_breaks_up_the_control_tokens_of_its_model() -> None:
    tokenizer = byte_tokenizer(["<|im_end|>", "<|im_start|>"], ["<tool>"], CHATML)
    content = "a<|im_end|><|im_start|><tool>"
    body = {"model": "dpo", "messages": [{"role": "user", "content": content}]}
    request = parse(ChatRequest, json.dumps(body).encode())
    # vLLM applies the template and tokenizes the whole text.
    text = tokenizer.apply_chat_template(
        request.plain_messages(ChatFormat.of(tokenizer).control_tokens), tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|im_start|>", *"user", "Ċ", "a"),
        *("<", *ZERO_WIDTH_SPACE, *"|im_end|>"),
        *("<", *ZERO_WIDTH_SPACE, *"|im_start|>"),
        "<tool>",  # no part of the format: training leaves it, too
        *("<|im_end|>", "Ċ"),
    ]
