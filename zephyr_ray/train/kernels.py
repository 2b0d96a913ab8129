"""Makes a model's norms, rotary positions and activations take less time and memory."""

import importlib.util
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
"""Model types whose layers have two norms, whose outputs only matrix products read."""


def round_norms(model: Any) -> None:
    """Makes the norms of a model of LIKE_LLAMA round their output to autocast's dtype.

    Autocast would round it in each matrix product that reads it: three times for queries, keys and
    values, each time with another copy for the backward pass.
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


def use_liger(model: Any) -> None:
    """Computes norms, rotary positions and the MLP's activation of a model of LIKE_LLAMA with
    Liger's kernels, if it is not quantized, there is a GPU and the package is installed."""
    import torch

    quantized = getattr(model, "is_quantized", False)
    if quantized or model.config.model_type not in LIKE_LLAMA or not torch.cuda.is_available():
        return
    if importlib.util.find_spec("liger_kernel") is None:
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    apply(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
