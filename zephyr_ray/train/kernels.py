"""Changes how a model computes what is between its matrix products, not what it computes."""

from typing import Any

LIKE_LLAMA = (
    "granite",
    "llama",
    "ministral",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Model types whose layers have two norms, each read by matrix products only."""


def round_norms(model: Any) -> None:
    """Makes the norms of a model of LIKE_LLAMA round their output to autocast's dtype.

    Autocast rounds it anyway, but for each matrix product that reads it: three times for queries,
    keys and values, each with a copy of its own for the backward pass.
    """
    import torch

    def rounded(module: Any, inputs: Any, output: Any) -> Any:
        device = output.device.type
        if not torch.is_autocast_enabled(device):
            return None
        return output.to(torch.get_autocast_dtype(device))

    if model.config.model_type in LIKE_LLAMA:
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(rounded)
