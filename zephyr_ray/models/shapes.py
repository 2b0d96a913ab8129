"""Computes a model's shape (parameters, matrices, KV cache) from its config.json, without
weights."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zephyr_ray.models.headers import count_parameters
from zephyr_ray.models.packaged import cached_package
from zephyr_ray.models.weights import HUB_ID

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose layers are four attention and three MLP matrices. Other architectures are
built on torch's meta device, which takes seconds."""

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "meta-llama/Llama-2-70b-hf": {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Parts of the config.json of models in our recipes, for planning without a hub."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one model."""

    family: str
    """The config's model_type; empty if unknown."""
    parameters: int
    """Number of parameters, including embeddings."""
    layers: int
    """Number of transformer blocks."""
    hidden: int
    """Elements of the residual stream per token."""
    ffn: int
    """Elements of the MLP's inner activation per token."""
    kv: int
    """Elements of all key heads per token and layer; the values have the same number."""
    vocabulary: int
    """Number of tokens in the vocabulary."""
    context: int
    """Maximum tokens per sequence; 0 if the config does not state it."""
    matrices: tuple[tuple[str, int, int], ...]
    """Linear layers of all blocks, without the output layer, as (name, outputs, inputs)."""

    @property
    def linear_parameters(self) -> int:
        """Number of parameters in `matrices`."""
        return sum(rows * columns for _, rows, columns in self.matrices)

    def adapter_parameters(self, r: int, targets: list[str] | None) -> int:
        """Returns the number of parameters of LoRA adapters of rank r on the targets (by default
        all matrices)."""
        return sum(
            r * (rows + columns)
            for name, rows, columns in self.matrices
            if targets is None or any(f".{name}".endswith(f".{t}") for t in targets)
        )

    def kv_bytes(self, tokens: int) -> int:
        """Returns the bytes of a bf16 KV cache for `tokens` tokens."""
        keys_and_values, bf16_bytes = 2, 2
        return tokens * self.layers * keys_and_values * self.kv * bf16_bytes


CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def context_of(config: dict[str, Any]) -> int:
    """Returns the maximum tokens per sequence that a config.json states, 0 if it states none.

    As in vLLM, scaled rotary positions reach `factor` times as far, unless the config states the
    extended length; sliding windows limit attention, not the sequence.
    """
    text = config.get("text_config") or config
    stated = next((text[key] for key in CONTEXT_KEYS if text.get(key)), 0)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "gemma3" in text.get("model_type", ""):
        return int(stated)
    reach = [stated]
    for scaling in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if scaling.get("rope_type", scaling.get("type")) in ("linear", "dynamic", "yarn"):
            start = scaling.get("original_max_position_embeddings") or stated
            reach.append(start * (scaling.get("factor") or 1))
    return int(max(reach))


def shape_of(config: dict[str, Any]) -> Shape:
    """Returns the shape that a config.json describes."""
    if config.get("model_type") not in LLAMA_LIKE:
        return _built_shape(config)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    layers = config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * head
    layer = [
        ("self_attn.q_proj", heads * head, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, heads * head),
        ("mlp.gate_proj", ffn, hidden),
        ("mlp.up_proj", ffn, hidden),
        ("mlp.down_proj", hidden, ffn),
    ]
    vectors = 2 * hidden
    vectors += heads * head + 2 * kv if config["model_type"] == "qwen2" else 0  # biases
    vectors += 2 * head if config["model_type"] == "qwen3" else 0  # norms of queries and keys
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    matrices = sum(rows * columns for _, rows, columns in layer)
    return Shape(
        family=config["model_type"],
        parameters=embeddings + layers * (matrices + vectors) + hidden,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        kv=kv,
        vocabulary=config["vocab_size"],
        context=context_of(config),
        matrices=tuple(layer * layers),
    )


EXPERTS = {"num_local_experts", "num_experts", "n_routed_experts"}


def _built_shape(config: dict[str, Any]) -> Shape:
    """Returns the shape of any architecture that transformers knows, by building the model on the
    meta device, which allocates no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    full_config = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(full_config)
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = [
        (name, *module.weight.shape)
        for name, module in model.named_modules()
        if id(module) not in ends and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    heads = full_config.num_attention_heads
    head = getattr(full_config, "head_dim", None) or full_config.hidden_size // heads
    return Shape(
        family=full_config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=full_config.num_hidden_layers,
        hidden=full_config.hidden_size,
        ffn=getattr(full_config, "intermediate_size", None) or 4 * full_config.hidden_size,
        kv=(getattr(full_config, "num_key_value_heads", None) or heads) * head,
        vocabulary=full_config.vocab_size,
        context=context_of(full_config.to_dict()),
        matrices=tuple(matrices),
    )


@cache
def find_shape(weights: str) -> Shape | None:
    """Returns the shape of a model in a folder, in a package or on the hub; None if its config is
    not available or not that of a dense decoder."""
    config = _find_config(weights)
    if not config or EXPERTS & config.keys():
        return None
    try:
        return shape_of(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None


def find_shape_or_size(weights: str) -> Shape | None:
    """Returns the shape of a model. Without a config, the shape has only the number of parameters
    in the local weights, so estimates from it are lower bounds; None without either."""
    if shape := find_shape(weights):
        return shape
    folder = Path(weights) if Path(weights).is_dir() else cached_package(weights)
    parameters = count_parameters(folder) if folder else 0
    if not parameters:
        return None
    return Shape(
        family="",
        parameters=parameters,
        layers=1,
        hidden=0,
        ffn=0,
        kv=0,
        vocabulary=0,
        context=0,
        matrices=(),
    )


def _find_config(weights: str) -> dict[str, Any] | None:
    folder = Path(weights) if Path(weights).is_dir() else cached_package(weights)
    if folder is None and weights in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[weights]
    path = folder / "config.json" if folder else _hub_config(weights)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _hub_config(weights: str) -> Path | None:
    """Returns the path of the hub model's config.json, downloaded now if it is not cached."""
    if not HUB_ID.fullmatch(weights):
        return None
    from huggingface_hub import HfApi, hf_hub_download

    try:
        return Path(hf_hub_download(weights, "config.json", local_files_only=True))
    except Exception:
        pass
    try:
        HfApi().model_info(weights, timeout=5)  # fails fast; a download would retry for minutes
        return Path(hf_hub_download(weights, "config.json"))
    except Exception:  # no network, or a gated or unknown model: no estimate
        return None
