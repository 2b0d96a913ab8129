"""Saves the trained model, so that plain transformers and vLLM load it."""

import shutil
from pathlib import Path
from typing import Any

from zephyr_ray.train.job import Job
from zephyr_ray.train.start_model import load_model


def save(job: Job, trainer: Any) -> None:
    """Writes model/ in fp32, and adapter/ if an adapter was trained.

    Runs on every worker, because all take part in gathering the weights; rank 0 writes.
    """
    import torch.distributed

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if torch.distributed.get_rank() == 0:
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

    `state` are the weights, if the model object does not hold them all (ZeRO-3).
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
