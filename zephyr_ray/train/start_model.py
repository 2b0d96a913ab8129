"""Loads what training starts from: the weights, and the chat format of their tokenizer."""

import importlib.util
from typing import Any

from zephyr_ray.chat import ChatFormat
from zephyr_ray.train.bits import four_bits
from zephyr_ray.train.settings import Lora


def load_model(weights: str, lora: Lora | None = None) -> Any:
    """Loads the start weights in fp32, or in 4 bits for QLoRA.

    Attention is FlashAttention if it is installed; else PyTorch's, with a mask that separates
    packed rows (transformers derives it from positions that restart).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from zephyr_ray.models.weights import resolve

    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    return AutoModelForCausalLM.from_pretrained(
        resolve(weights),
        dtype=torch.float32,
        attn_implementation="flash_attention_2" if flash else "sdpa",
        **(four_bits() if lora and lora.quantized else {}),
    )


def load_chat(weights: str) -> ChatFormat:
    """Loads the tokenizer of the start weights and returns its chat format."""
    from transformers import AutoTokenizer

    from zephyr_ray.models.weights import resolve

    return ChatFormat.of(AutoTokenizer.from_pretrained(resolve(weights)))
