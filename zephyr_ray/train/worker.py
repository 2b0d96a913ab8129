"""One training worker: trains the objective with TRL's trainer on a DeepSpeed engine, from the last
reported checkpoint on, and saves the model."""

from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.store import write_whole
from zephyr_ray.train.arguments import adapter_config, trainer_arguments
from zephyr_ray.train.checkpoints import last_checkpoint
from zephyr_ray.train.cpu import keep_freed_memory, let_deepspeed_run_on_cpu
from zephyr_ray.train.job import Job
from zephyr_ray.train.reference import with_reference
from zephyr_ray.train.saving import save
from zephyr_ray.train.start_model import load_chat, load_model


def run_worker(config: dict[str, Any]) -> None:
    """Runs one Ray Train worker.

    Permanent errors go to a file, because Ray would retry an exception.
    """
    job: Job = config["job"]
    try:
        _train_and_save(job)
    except Permanent as error:
        write_whole(job.refusal, str(error))


def _train_and_save(job: Job) -> None:
    import ray.train
    import torch

    settings = job.settings
    checkpoint = last_checkpoint(job)
    if not torch.cuda.is_available():
        torch.set_num_threads(settings.cpus_per_worker)
        keep_freed_memory()
        let_deepspeed_run_on_cpu()
    from datasets import load_from_disk
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig

    from zephyr_ray.train.reporter import Reporter
    from zephyr_ray.train.trainer import Trainer

    objective = settings.objective()
    data = load_from_disk(str(job.scratch / "data"))
    if objective.needs_reference:
        data = with_reference(job, objective, data)
    arguments = SFTConfig(**trainer_arguments(job))
    # With ZeRO-3, from_pretrained splits the weights as it loads them, because `arguments` exist.
    model = load_model(job.weights, settings.lora)
    model.config.use_cache = False
    trainer = Trainer(
        objective,
        tags=["trl", settings.kind],
        tokenizer=load_chat(job.weights).prepare(),
        model=model,
        args=arguments,
        train_dataset=data.select(job.order),
        peft_config=adapter_config(settings.lora),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(job, trainer, ray.train.get_context().get_world_rank()))
    trainer.train(resume_from_checkpoint=checkpoint)
    save(job, trainer)
    ray.train.report({"step": job.steps})
