"""A model's shape from its config.json alone: parameters, matrices, KV cache. No weight is read."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zephyr_ray.models.headers import count_parameters
from zephyr_ray.models.packaged import cached_package
from zephyr_ray.models.weights import HUB_ID

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose layers are four attention and three MLP matrices; others are built on torch's meta
device, which takes seconds."""

KNOWN: dict[str, dict[str, Any]] = {
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
"""What stands in the config.json of the models that our recipes name, to plan where no hub is."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. `matrices` are the linear layers but the output one, as (name, outputs,
    inputs), all layers'; `parameters` are all, embeddings too."""

    parameters: int
    layers: int
    hidden: int
    ffn: int
    kv: int
    """Keys of all KV heads of one token in one layer, in elements; values are as many."""
    vocabulary: int
    context: int
    matrices: tuple[tuple[str, int, int], ...]

    @property
    def linear(self) -> int:
        return sum(rows * columns for _, rows, columns in self.matrices)

    def adapters(self, r: int, targets: list[str] | None) -> int:
        """Parameters of LoRA adapters of rank r on the targets (all linear layers by default)."""
        return sum(
            r * (rows + columns)
            for name, rows, columns in self.matrices
            if targets is None or any(f".{name}".endswith(f".{t}") for t in targets)
        )

    def kv_bytes(self, tokens: int) -> int:
        """KV cache of so many tokens in bf16."""
        return tokens * self.layers * 2 * self.kv * 2


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that a config.json describes."""
    if config.get("model_type") not in LLAMAS:
        return _built(config)
    hidden, ffn, layers = (config[k] for k in ("hidden_size", "intermediate_size", LAYERS))
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
        parameters=embeddings + layers * (matrices + vectors) + hidden,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        kv=kv,
        vocabulary=config["vocab_size"],
        context=config.get("max_position_embeddings", 0),
        matrices=tuple(layer * layers),
    )


LAYERS = "num_hidden_layers"
EXPERTS = {"num_local_experts", "num_experts", "n_routed_experts"}


def _built(config: dict[str, Any]) -> Shape:
    """Of any architecture that transformers knows, from the model itself without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known)
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = [
        (name, *module.weight.shape)
        for name, module in model.named_modules()
        if id(module) not in ends and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    heads = known.num_attention_heads
    head = getattr(known, "head_dim", None) or known.hidden_size // heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=known.num_hidden_layers,
        hidden=known.hidden_size,
        ffn=getattr(known, "intermediate_size", None) or 4 * known.hidden_size,
        kv=(getattr(known, "num_key_value_heads", None) or heads) * head,
        vocabulary=known.vocab_size,
        context=getattr(known, "max_position_embeddings", 0),
        matrices=tuple(matrices),
    )


@cache
def find_shape(weights: str) -> Shape | None:
    """The shape of a folder's, a packaged or a hub's model; None where no config can be had, or not
    one of a dense decoder."""
    config = _config(weights)
    if not config or EXPERTS & config.keys():
        return None
    try:
        return shape_of(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None


def weigh(weights: str) -> Shape | None:
    """Returns the shape, or a shape that knows only the number of parameters of a local folder, so
    that what is computed from it is a lower bound; None if neither is at hand."""
    if shape := find_shape(weights):
        return shape
    folder = Path(weights) if Path(weights).is_dir() else cached_package(weights)
    parameters = count_parameters(folder) if folder else 0
    return Shape(parameters, 1, 0, 0, 0, 0, 0, ()) if parameters else None


def _config(weights: str) -> dict[str, Any] | None:
    folder = Path(weights) if Path(weights).is_dir() else cached_package(weights)
    if folder is None and weights in KNOWN:
        return KNOWN[weights]
    place = folder / "config.json" if folder else _from_hub(weights)
    try:
        read = json.loads(place.read_text(encoding="utf-8")) if place else None
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def _from_hub(weights: str) -> Path | None:
    """Its config.json only: the downloaded copy, or the hub's."""
    if not HUB_ID.fullmatch(weights):
        return None
    from huggingface_hub import HfApi, hf_hub_download

    try:
        return Path(hf_hub_download(weights, "config.json", local_files_only=True))
    except Exception:
        pass
    try:
        HfApi().model_info(weights, timeout=5)  # a download retries for minutes
        return Path(hf_hub_download(weights, "config.json"))
    except Exception:  # no route, gated, unknown: there is nothing to estimate from
        return None
