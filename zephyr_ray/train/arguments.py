"""Arguments of TRL's trainer, from the settings of a stage."""

import math
from typing import Any

from zephyr_ray.train.bits import need_bitsandbytes
from zephyr_ray.train.job import Job
from zephyr_ray.train.settings import Lora

OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged_adamw_32bit": "paged_adamw_32bit"}
"""Names in transformers of the optimizers in our settings."""


def trainer_arguments(job: Job) -> dict[str, Any]:
    """Returns the arguments of TRL's SFTConfig."""
    import torch

    settings = job.settings
    if settings.optimizer != "adamw":
        need_bitsandbytes(f"optimizer: {settings.optimizer}")
    micro, accumulation = settings.batches()
    return {
        "output_dir": str(job.checkpoints),
        "max_steps": job.steps,
        "num_train_epochs": 1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": math.ceil(settings.warmup * job.steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": OPTIMIZERS[settings.optimizer],
        "seed": settings.seed,
        "deepspeed": settings.deepspeed(),
        # DeepSpeed's torch_autocast gives mixed precision; the trainer's would round the weights.
        "bf16": False,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_every,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Rows are tokenized, with at most max_length tokens; the collator selects the columns.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": None,
    }


def adapter_config(lora: Lora | None) -> Any:
    """Returns PEFT's configuration of the adapters, or None if the whole model is trained."""
    from peft import LoraConfig

    return lora and LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
