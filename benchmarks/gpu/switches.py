"""Changes our models or PyTorch, for comparison: each is a `patch` of `contestants.ours`."""

import sys
from collections.abc import Callable
from typing import Any


def unchanged() -> None:
    pass


def compiled_parts() -> None:
    _change_models(compile_parts)


def expandable_segments() -> None:
    """Lets PyTorch's allocator grow its segments instead of reserving new ones."""
    import torch

    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def compiled_layers() -> None:
    """Compiles every layer of a Llama, for any number of tokens."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    LlamaDecoderLayer.forward = torch.compile(LlamaDecoderLayer.forward, dynamic=True)


def compile_parts(model: Any) -> None:
    """Compiles what a Llama computes between matrix products: norms (rounded as by
    `kernels.round_norms`), rotary positions and the MLP's activation."""
    import torch
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # a pool of processes would start more slowly
    modeling = sys.modules[type(model).__module__]
    epsilon = model.config.rms_norm_eps

    @torch.compile(dynamic=True)
    def norm(hidden: Any, weight: Any) -> Any:
        device = hidden.device.type
        scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon) * weight
        if torch.is_autocast_enabled(device):
            scaled = scaled.to(torch.get_autocast_dtype(device))
        return scaled

    @torch.compile(dynamic=True)
    def rotary(query: Any, key: Any, cos: Any, sin: Any) -> Any:
        half = modeling.rotate_half
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return tuple((x * cos + half(x) * sin).to(x.dtype) for x in (query, key))

    @torch.compile(dynamic=True)
    def gated(gate: Any, up: Any) -> Any:
        return torch.nn.functional.silu(gate) * up

    modeling.apply_rotary_pos_emb = rotary
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm):
            module.forward = _bound(lambda m, hidden: norm(hidden, m.weight), module)
        layer.mlp.forward = _bound(
            lambda m, x: m.down_proj(gated(m.gate_proj(x), m.up_proj(x))), layer.mlp
        )


def _bound(function: Callable[..., Any], module: Any) -> Callable[..., Any]:
    return lambda *arguments: function(module, *arguments)


def _change_models(*changes: Callable[[Any], None]) -> None:
    """Applies the changes to every model that our loop loads."""
    from zephyr_ray.train import reference, worker

    load = worker.load_model

    def changed(*arguments: Any, **named: Any) -> Any:
        model = load(*arguments, **named)
        for change in changes:
            change(model)
        return model

    worker.load_model = reference.load_model = changed
