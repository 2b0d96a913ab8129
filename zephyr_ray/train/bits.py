"""Features that need the package bitsandbytes: start weights in 4 bits, and a paged optimizer."""

import importlib.util
from typing import Any

from zephyr_ray.errors import Permanent


def four_bits() -> dict[str, Any]:
    """Returns the arguments of from_pretrained for QLoRA: NF4 on this worker's GPU, matrix products
    in bf16."""
    import torch
    from transformers import BitsAndBytesConfig

    need_bitsandbytes("lora.quantized")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def need_bitsandbytes(what: str) -> None:
    """Raises Permanent if the package is not installed; `what` is the setting that needs it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Permanent(f"{what} needs the package bitsandbytes on every worker; install it")
