"""Runs one worker: trains the model on the objective with TRL's trainer and DeepSpeed, resuming
from the last reported checkpoint, and saves it; or computes log-probabilities of pairs."""

import math
from typing import TYPE_CHECKING, Any

from zephyr_ray.errors import Permanent
from zephyr_ray.store import write_atomically
from zephyr_ray.train.batches import Dealer, micro_batches
from zephyr_ray.train.context import Context, RayContext
from zephyr_ray.train.cpu import prepare_worker
from zephyr_ray.train.data import Data, TokenRows
from zephyr_ray.train.job import Job, WorkerJob
from zephyr_ray.train.model import load_chat, load_config, load_model, need_bitsandbytes, save
from zephyr_ray.train.packing import open_data
from zephyr_ray.train.reference import add_reference_log_probs, compute_log_probs
from zephyr_ray.train.settings import Lora

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective
    from zephyr_ray.train.trainer import Trainer


def run_worker(config: dict[str, Any]) -> None:
    """Runs one Ray Train worker.

    The message of a permanent error goes to a file, because Ray wraps the exception. It is raised
    too, to end the other workers, which would wait for this one.
    """
    job: WorkerJob = config["job"]
    try:
        if isinstance(job, Job):
            context = RayContext()
            train_and_save(job, context)
            context.report(job.steps, checkpoint=None)
        else:
            score(job)
    except Permanent as error:
        write_atomically(job.refusal, str(error))
        raise


def train_and_save(job: Job, context: Context) -> None:
    """Trains from the last checkpoint and writes model/. Needs torch.distributed's process
    group."""
    trainer = make_trainer(job, context)
    # After make_trainer, which prepares the process before it imports transformers.
    from zephyr_ray.train.reporter import last_checkpoint

    checkpoint = last_checkpoint(job, context)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    save(job, trainer)


def score(job: WorkerJob) -> None:
    """Writes the log-probabilities of all pairs to a journal. Needs torch.distributed's process
    group."""
    prepare_worker(job.settings.cpus_per_worker)
    data = TokenRows(job.scratch / "data")
    compute_log_probs(job, data, range(len(data)))


def make_trainer(job: Job, context: Context) -> "Trainer":
    """Returns the trainer with its model and data, after the reference pass if the objective needs
    one."""
    import torch.distributed

    settings = job.settings
    prepare_worker(settings.cpus_per_worker)
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig

    from zephyr_ray.train.reporter import Reporter
    from zephyr_ray.train.trainer import Trainer
    from zephyr_ray.train.validation import Validation

    objective, rank = settings.objective(), torch.distributed.get_rank()
    data = load_data(job, objective)
    held_out = None if settings.validation is None else load_data(job.validation, objective)
    config, world_size = load_config(job.weights), torch.distributed.get_world_size()

    def dealer_of(data: Data) -> Dealer:
        return objective.dealer(config, data, settings.micro_batch, world_size)

    steps = micro_batches(job.order, settings.global_batch, dealer_of(data), rank)
    arguments = SFTConfig(**trainer_arguments(job, passes=len(steps[0])))
    # After `arguments`: with ZeRO-3, they make from_pretrained split the weights as it loads them.
    model = load_model(job.weights, settings.is_quantized(), adapted=settings.lora is not None)
    model.config.use_cache = False
    trainer = Trainer(
        objective,
        tags=["trl", settings.kind],
        tokenizer=load_chat(job.weights).prepare(),
        model=model,
        args=arguments,
        data=data,
        steps=steps,
        global_batch=settings.global_batch,
        peft_config=adapter_config(settings.lora),
    )
    trainer.remove_callback(PrinterCallback)
    validation = None
    if held_out is not None:
        dealer, rows = dealer_of(held_out), range(len(held_out))
        validation = Validation(trainer, held_out, dealer.deal(rows, dealer.passes(rows))[rank])
    trainer.add_callback(Reporter(job, trainer, context, rank, validation))
    return trainer


def load_data(job: Job, objective: "Objective") -> Data:
    """Returns the rows in scratch/data, after the reference pass if the objective needs one."""
    data: Data = open_data(job.scratch / "data")
    if objective.needs_reference:
        data = add_reference_log_probs(job, data)
    return data


def trainer_arguments(job: Job, passes: int) -> dict[str, Any]:
    """Returns the arguments of TRL's SFTConfig; `passes` are forward passes per step."""
    import torch

    settings = job.settings
    if settings.optimizer != "adamw":
        need_bitsandbytes(f"optimizer: {settings.optimizer}")
    has_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(job.checkpoints),
        "max_steps": job.steps,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,  # `Trainer` makes the batches
        "gradient_accumulation_steps": passes,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        # A step of warmup has a lower rate, the first one 0: the last step is never one.
        "warmup_steps": min(math.ceil(settings.warmup * job.steps), job.steps - 1),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": {"adamw": "adamw_torch_fused"}.get(settings.optimizer, settings.optimizer),
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
        # A separate process makes the batches of the next step while the GPU computes this one.
        "dataloader_num_workers": int(has_gpu),
        "dataloader_prefetch_factor": max(2, min(passes, 16)) if has_gpu else None,
        "dataloader_pin_memory": has_gpu,
        "accelerator_config": {"non_blocking": has_gpu},
        # Rows already hold at most max_length tokens; the collator selects the columns.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": None,
    }


def adapter_config(lora: Lora | None) -> Any:
    """Returns PEFT's configuration of the adapters, or None if all weights are trained."""
    from peft import LoraConfig

    return lora and LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
