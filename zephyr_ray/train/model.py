"""Loads the initial weights and their chat format, and saves the trained model."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.models.checks import load_chat_format
from zephyr_ray.models.weights import resolve
from zephyr_ray.train.job import Job
from zephyr_ray.train.kernels import round_norms, use_liger

FAMILIES = (
    "cohere2",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_neox",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
"""Model types that attend per segment, each proven by a test. Others may pass a mask or a window
that this attention would ignore (doge, qwen2_moe), or mix tokens in other layers (lfm2)."""


def load_model(weights: str, quantized: bool = False, adapted: bool = False) -> Any:
    """Loads the initial weights in fp32, or in 4 bits for QLoRA; `adapted` models get adapters.

    Most families attend per segment of a row (`FAMILIES`); others attend with a mask over
    the row, which transformers derives from positions that restart.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        resolve(weights),
        dtype=torch.float32,
        attn_implementation="sdpa",
        **(four_bits() if quantized else {}),
    )
    use_segments(model)
    if not (adapted or quantized):  # these would convert the output back to fp32
        round_norms(model)
    use_liger(model)
    return model


def load_config(weights: str) -> Any:
    """Loads the configuration of the initial weights."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolve(weights))


def use_segments(model: Any) -> None:
    """Makes a model of one of FAMILIES attend per segment of a row."""
    from zephyr_ray.train.attention import attend_by_segments

    if model.config.model_type in FAMILIES:
        attend_by_segments(model)


def load_chat(weights: str) -> ChatFormat:
    """Loads the tokenizer of the initial weights and returns its chat format."""
    return load_chat_format(resolve(weights))


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


def save(job: Job, trainer: Any) -> None:
    """Writes model/ in fp32, and adapter/ if an adapter was trained.

    Runs on every worker, because all take part in gathering the weights; rank 0 writes. Raises
    Permanent if a weight is not finite, which the last step's gradients may have caused.
    """
    import torch.distributed

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if torch.distributed.get_rank() == 0:
        if broken := [name for name, weight in state.items() if not weight.isfinite().all()]:
            raise Permanent(
                f"{len(broken)} weights are not finite after the last step (the first: "
                f"{broken[0]}); lower learning_rate"
            )
        part, folder = job.scratch / "model", job.folder / "model"
        model = trainer.model
        if job.settings.lora:
            model.save_pretrained(job.folder / "adapter", state_dict=state)
            model, state = merged(job), None
        write_model(model, trainer.processing_class, part, state)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    torch.distributed.barrier()


def write_model(model: Any, tokenizer: Any, folder: Path, state: Any = None) -> None:
    """Writes the model with its tokenizer, whose padding and end tokens become the model's own.

    `state` holds the weights if the model object lacks some of them (ZeRO-3).
    """
    model.config.use_cache = True
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def merged(job: Job) -> Any:
    """Returns the start model in full precision with the saved adapter added to its weights."""
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would split this plain copy too
    adapter = str(job.folder / "adapter")
    return PeftModel.from_pretrained(load_model(job.weights), adapter).merge_and_unload()
