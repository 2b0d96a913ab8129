"""Makes the model and the data of the training benchmarks from a seed: random weights, and random
tokens with the lengths of UltraChat and UltraFeedback. Needs no network."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Size:
    """Sizes of one benchmark."""

    model: dict[str, int]
    sft_length: int
    """Maximum tokens per packed sequence."""
    dpo_length: int
    """Maximum tokens of prompt and answer."""
    sft_batch: int
    """Sequences per optimizer step."""
    dpo_batch: int
    """Pairs per optimizer step."""
    micro: int
    """Rows of maximum length per forward pass, unless a contestant says otherwise."""
    steps: int
    warmup: int
    """Initial steps that are not measured."""


# A Mistral with 20 narrower layers: head size 128, 4 query heads per key head, MLP 3.5 × hidden.
BILLION = Size(
    model={
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    sft_length=2048,
    dpo_length=1024,
    sft_batch=16,
    dpo_batch=32,
    micro=4,
    steps=7,
    warmup=2,
)
TINY = Size(
    model={
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    sft_length=128,
    dpo_length=96,
    sft_batch=4,
    dpo_batch=4,
    micro=2,
    steps=3,
    warmup=1,
)


def write_model(folder: Path, size: Size, device: str) -> None:
    """Writes a Llama with random weights in bf16, and a tokenizer with one token per byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from zephyr_ray.chat import CHATML

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(SPECIAL),
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **size.model,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def dialogues(size: Size, tokens: int) -> list[Row]:
    """Returns dialogues with at least `tokens` tokens in total. Their mean length is half of
    max_length, like UltraChat's 1,011 of 2,048; every second turn is trained."""
    pick = random.Random(0)
    rows, total = [], 0
    while total < tokens:
        length = _lognormal(pick, size.sft_length / 2, 0.5, size.sft_length)
        ids = _tokens(pick, size, length)
        turn = max(2, length // 6)
        labels = [token if at // turn % 2 else -100 for at, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
        total += length
    return rows


def pairs(size: Size, count: int) -> list[Row]:
    """Returns pairs with UltraFeedback's lengths relative to max_length: on average 177 of 1,024
    tokens per prompt and 272 per answer; the two answers of a pair have similar lengths."""
    pick, most = random.Random(1), size.dpo_length
    rows = []
    for _ in range(count):
        prompt = _lognormal(pick, most * 177 / 1024, 0.9, most * 3 // 4)
        mean = most * 272 / 1024 * math.exp(pick.gauss(-(0.5**2) / 2, 0.5))
        chosen, rejected = (_lognormal(pick, mean, 0.35, most - prompt) for _ in range(2))
        rows.append(
            {
                "prompt_ids": _tokens(pick, size, prompt),
                "chosen_ids": _tokens(pick, size, chosen),
                "rejected_ids": _tokens(pick, size, rejected),
                "lengths": [prompt + chosen, prompt + rejected],
            }
        )
    return rows


def longest_pairs(size: Size, count: int) -> list[Row]:
    """Returns pairs whose answers both fill max_length: the planner's worst case."""
    pick, prompt = random.Random(2), 8
    answer = size.dpo_length - prompt
    return [
        {
            "prompt_ids": _tokens(pick, size, prompt),
            "chosen_ids": _tokens(pick, size, answer),
            "rejected_ids": _tokens(pick, size, answer),
            "lengths": [size.dpo_length] * 2,
        }
        for _ in range(count)
    ]


def _lognormal(pick: random.Random, mean: float, sigma: float, most: int) -> int:
    return min(most, max(2, round(mean * math.exp(pick.gauss(-sigma * sigma / 2, sigma)))))


def _tokens(pick: random.Random, size: Size, count: int) -> list[int]:
    return pick.choices(range(len(SPECIAL), size.model["vocab_size"]), k=count)


def matrix_parameters(size: Size) -> int:
    """Returns the parameters of all matrix products: the model without its input embedding."""
    m = size.model
    head = m["hidden_size"] // m["num_attention_heads"]
    attention = 2 * m["hidden_size"] * (m["hidden_size"] + head * m["num_key_value_heads"])
    mlp = 3 * m["hidden_size"] * m["intermediate_size"]
    return m["num_hidden_layers"] * (attention + mlp) + m["vocab_size"] * m["hidden_size"]


def parameters(size: Size) -> int:
    """Returns the parameters of the model, whose input and output embeddings are two matrices."""
    return matrix_parameters(size) + size.model["vocab_size"] * size.model["hidden_size"]


def training_flops(size: Size, lengths: Iterable[int], per_parameter: float) -> float:
    """Returns the FLOPs of training on sequences of these lengths, without padding and
    recomputation: `per_parameter` (6; 4 if the weights are frozen; 2 for a forward pass) per matrix
    parameter and token, plus `per_parameter` / 6 · 12 · layers · hidden · length² for attention
    (PaLM's count, not halved for causality)."""
    m, lengths = size.model, list(lengths)
    attention = 12 * m["num_hidden_layers"] * m["hidden_size"] * sum(n * n for n in lengths)
    return per_parameter * (matrix_parameters(size) * sum(lengths) + attention / 6)
