"""One training worker: builds TRL's trainer on a DeepSpeed engine from a job, goes on from the last
reported checkpoint, and helps to save the model.
"""

import ctypes
import importlib.util
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr_ray.chat import ChatFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.store import Journal, write_whole
from zephyr_ray.train.bits import four_bits, need_bitsandbytes
from zephyr_ray.train.settings import TrainingSettings

log = logging.getLogger("zephyr_ray")


@dataclass(frozen=True)
class Job:
    """Everything a worker needs. Folders are on storage that every node sees."""

    settings: TrainingSettings
    weights: str
    """Start weights: what `models.weights.resolve` takes."""
    folder: Path
    """The artifact's folder: model/, and scratch/ with data, checkpoints and steps."""
    order: list[int]
    """Row indices of scratch/data, steps × global_batch of them."""
    classes: Callable[[], tuple[type, type]]
    """TRL's arguments and trainer; a function of a module, because importing TRL takes seconds."""
    arguments: dict[str, Any]
    """Of the trainer, beside the common ones."""
    prepare: Callable[["Job", Any], Any] | None = None
    """What the workers do to the data set first."""

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def steps(self) -> int:
        return len(self.order) // self.settings.global_batch


def refuse_other_engines(engine: Any, stage: int) -> None:
    """Permanent unless this is DeepSpeed's engine at the ZeRO stage asked for.

    Where it cannot use DeepSpeed, the Hugging Face trainer ignores the configuration in silence.
    """
    import deepspeed

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise Permanent(
            f"training would run on {type(engine).__name__}, not on DeepSpeed: the trainer ignored "
            "the DeepSpeed configuration; install the pinned versions of accelerate, transformers "
            "and deepspeed"
        )
    found = engine.zero_optimization_stage()
    if found != stage:
        raise Permanent(f"DeepSpeed runs at ZeRO stage {found}, the recipe asks for {stage}")


def run_worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. What is wrong for good is written down: raised, it would be retried."""
    job: Job = config["job"]
    try:
        _train_and_save(job)
    except Permanent as error:
        write_whole(job.scratch / "refused", str(error))


def _train_and_save(job: Job) -> None:
    import ray.train
    import torch

    resume = _checkpoint(job)
    if not torch.cuda.is_available():
        torch.set_num_threads(job.settings.cpus_per_worker)
        _keep_freed_memory()
        _let_deepspeed_run_on_cpu()
    from datasets import load_from_disk
    from transformers import PrinterCallback

    data = load_from_disk(str(job.scratch / "data"))
    if job.prepare:
        data = job.prepare(job, data)
    config_class, trainer_class = job.classes()
    # From here on, ZeRO-3 has from_pretrained split the weights as it loads them.
    arguments = config_class(**_arguments(job) | job.arguments)
    model = load_model(job)
    model.config.use_cache = False
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=data.select(job.order),
        processing_class=load_chat(job.weights).prepare(),
        peft_config=_peft(job),
    )
    trainer.job = job
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_reporter(job, trainer))
    trainer.train(resume_from_checkpoint=resume)
    _save(job, trainer)
    ray.train.report({"step": job.steps})


def _keep_freed_memory() -> None:
    """Otherwise glibc returns large tensors to the system and faults them in again, at every step:
    a third of the CPU time of a forward and backward pass of 340 tokens of a 135M model, measured.
    """
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def load_model(job: Job, whole: bool = False) -> Any:
    """The start weights in fp32 (QLoRA's in 4 bits, unless `whole`), with FlashAttention where it
    is installed; else with PyTorch's attention and a mask that keeps packed rows apart (from their
    restarting positions)."""
    import torch
    from transformers import AutoModelForCausalLM

    from zephyr_ray.models.weights import resolve

    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    lora = job.settings.lora
    return AutoModelForCausalLM.from_pretrained(
        resolve(job.weights),
        dtype=torch.float32,
        attn_implementation="flash_attention_2" if flash else "sdpa",
        **(four_bits() if lora and lora.quantized and not whole else {}),
    )


def load_chat(weights: str) -> ChatFormat:
    from transformers import AutoTokenizer

    from zephyr_ray.models.weights import resolve

    return ChatFormat.of(AutoTokenizer.from_pretrained(resolve(weights)))


def _checkpoint(job: Job) -> str | None:
    """The last checkpoint that all workers reported; whatever else lies there is half written."""
    import ray.train
    import torch.distributed

    reported = ray.train.get_checkpoint()
    context = ray.train.get_context()
    if reported and not _fits(Path(reported.path), job.settings.zero, context.get_world_size()):
        log.warning("the checkpoint is of other workers or another zero: training starts again")
        reported = None
    kept = Path(reported.path).name if reported else None
    if context.get_world_rank() == 0:
        for path in (job.scratch / "checkpoints").glob("checkpoint-*"):
            if path.name != kept:
                shutil.rmtree(path, ignore_errors=True)
    torch.distributed.barrier()
    return str(reported.path) if reported else None


def _fits(checkpoint: Path, zero: int, workers: int) -> bool:
    """Whether DeepSpeed wrote it at this ZeRO stage: without ZeRO one file holds all, whoever reads
    it; stages 1 and 2 write a part of the optimiser for each worker, stage 3 one of the model too.
    """
    optimizers = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    models = len(list(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")))
    return (optimizers, models) == (workers if zero else 0, workers if zero == 3 else 0)


OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged_adamw_32bit": "paged_adamw_32bit"}
"""Our names of optimisers in transformers."""


def _arguments(job: Job) -> dict[str, Any]:
    """Arguments common to TRL's trainers."""
    import torch

    settings = job.settings
    if settings.optimizer != "adamw":
        need_bitsandbytes(f"optimizer: {settings.optimizer}")
    micro, accumulation = settings.batches()
    return {
        "output_dir": str(job.scratch / "checkpoints"),
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
        # Mixed precision is DeepSpeed's torch_autocast: the trainer's own would round the weights.
        "bf16": False,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_every,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": True,
        "max_length": None,
    }


def _peft(job: Job) -> Any:
    from peft import LoraConfig

    lora = job.settings.lora
    return lora and LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )


def _reporter(job: Job, trainer: Any) -> Any:
    """Checks the engine, writes the steps, and reports checkpoints to Ray Train."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode
    from transformers import TrainerCallback

    rank = ray.train.get_context().get_world_rank()
    journal = Journal(job.scratch / "steps", writer="rank0") if rank == 0 else None

    class Reporter(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            refuse_other_engines(trainer.model_wrapped, job.settings.zero)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                raise Permanent(
                    f"the loss is {logs['loss']} at step {state.global_step}; "
                    "lower learning_rate, or look at the rows"
                )
            if journal:
                seconds = time.monotonic() - self.started
                entry = {"step": state.global_step, "steps": job.steps, "seconds": seconds}
                journal.append({**entry, **logs})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= job.steps:
                control.should_save = False  # the model itself comes next

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            ray.train.report(
                {"step": state.global_step},
                # One report names it; the others wait there until every worker has written.
                checkpoint=Checkpoint(path) if rank == 0 else None,
                checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            )

    return Reporter()


class LeanCheckpoints:
    """Mixed into TRL's trainers: a checkpoint is the engine's state; no second copy of the model
    and no model card."""

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            raise AssertionError("the model is saved by _save")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass


def _save(job: Job, trainer: Any) -> None:
    """model/ in fp32: plain transformers and vLLM load it. Every rank takes part in gathering."""
    import torch.distributed

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if torch.distributed.get_rank() == 0:
        part, folder = job.folder / "scratch" / "model", job.folder / "model"
        model = trainer.model
        if job.settings.lora:
            model.save_pretrained(job.folder / "adapter", state_dict=state)
            model, state = _merged(job), None
        model.config.use_cache = True
        tokenizer = trainer.processing_class
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(part, state_dict=state)
        tokenizer.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    torch.distributed.barrier()


def _merged(job: Job) -> Any:
    """The start weights with the saved adapter added to them."""
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would split this plain copy too
    adapter = str(job.folder / "adapter")
    return PeftModel.from_pretrained(load_model(job, whole=True), adapter).merge_and_unload()


def _let_deepspeed_run_on_cpu() -> None:
    """Without an accelerator, Hugging Face's libraries ignore DeepSpeed unless told otherwise.

    Private names of the pinned versions; `refuse_other_engines` finds out when they have moved.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import trl.trainer.utils
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    found = PartialState._prepare_backend

    def with_gloo(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = found(self, *args, **kwargs)
        return (backend, kind) if backend else ("gloo", DistributedType.MULTI_CPU)

    PartialState._prepare_backend = with_gloo
    # A collective for inference that g++ would compile for a minute.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.build_shm_op = lambda: None
    # TRL leaves untrained positions out of the output layer only where it believes to have Triton.
    trl.trainer.utils._use_triton = lambda device: True
