"""Trains with zephyr_ray and with TRL on the same rows, and measures both in the same way."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.workload import Row, Size, parameters, training_flops
from zephyr_ray.train.data import ID, Shard, write_index
from zephyr_ray.train.packing import open_data, pack, write_packing

GIB = 2**30
PEAK_TFLOPS = 989
"""Dense bf16 TFLOP/s of an H100 or H200 SXM, from the data sheet."""


@dataclass
class Measured:
    """Measurements of one training run; the rates exclude its warm-up steps."""

    seconds: float
    """Per optimizer step."""
    rows_per_second: float
    tokens_per_second: float
    """Tokens of the sequences without padding; a pair's prompt counts twice."""
    mfu: float
    """Fraction of PEAK_TFLOPS, by `workload.training_flops`."""
    allocated: float
    """Peak GiB in PyTorch's allocator during training (GPU), or 0."""
    reserved: float
    on_device: float
    """GiB in use on the device at the end, with CUDA's context."""
    host: float
    """Peak resident GiB of the process."""
    tflops: float
    """TFLOP/s as a recipe's `hardware.tflops` counts them: 6 operations per parameter and token of
    a sequence; 4 with LoRA, 8 with a reference at every step."""
    setup: float
    """Seconds before the first step: loading, and the reference pass if there is one."""
    losses: list[float]


class Meter(TrainerCallback):
    """Measures steps and memory of a transformers trainer."""

    def __init__(self, profile: Path | None = None):
        self.started, self.ends, self.losses = time.perf_counter(), [], []
        self.profile, self.profiler = profile, None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.ends:
            self.setup = time.perf_counter() - self.started
        if self.profile and state.global_step == state.max_steps - 1:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self.profiler:
            self.profiler.stop()
            sort = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self.profiler.key_averages().table(sort_by=sort, row_limit=15)
            self.profile.write_text(table, encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def result(self, size: Size, rows: list[Row], per_parameter: float, shared: bool) -> Measured:
        """Returns the measurements. `rows` are the rows of the measured steps, in any order; if
        `shared`, a pair's prompt is computed once, and its FLOPs are counted once."""
        steps = len(self.ends) - size.warmup
        seconds = (self.ends[-1] - self.ends[size.warmup - 1]) / steps
        sequences = [n for row in rows for n in sequence_lengths(row)]
        computed = [n for row in rows for n in sequence_lengths(row, shared)]
        flops = training_flops(size, computed, per_parameter) / steps
        gpu = torch.cuda.is_available()
        free, total = torch.cuda.mem_get_info() if gpu else (0, 0)
        return Measured(
            seconds=seconds,
            rows_per_second=len(rows) / steps / seconds,
            tokens_per_second=sum(sequences) / steps / seconds,
            mfu=flops / seconds / PEAK_TFLOPS / 1e12,
            allocated=torch.cuda.max_memory_allocated() / GIB if gpu else 0,
            reserved=torch.cuda.max_memory_reserved() / GIB if gpu else 0,
            on_device=(total - free) / GIB,
            host=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            tflops=per_parameter * parameters(size) * sum(sequences) / steps / seconds / 1e12,
            setup=self.setup,
            losses=self.losses,
        )


def sequence_lengths(row: Row, shared: bool = False) -> list[int]:
    """Returns the lengths of a row's sequences: its dialogues, or its two answers with the prompt,
    which is counted once if `shared`."""
    if "prompt_ids" not in row:
        return list(row.get("seq_lengths") or [len(row["input_ids"])])
    prompt, answers = len(row["prompt_ids"]), [len(row["chosen_ids"]), len(row["rejected_ids"])]
    return [prompt + answers[0], answers[1] + (0 if shared else prompt)]


def write_rows(stage: Any, rows: list[Row], folder: Path) -> int:
    """Writes the rows as a training stage's scratch/data; returns their number after packing."""
    data = folder / "scratch" / "data"
    data.mkdir(parents=True)
    tokens = [{name: row[name] for name in stage.columns} | {ID: []} for row in rows]
    Shard(data, 0).write(tokens)
    lengths = np.array([[len(ids) for ids in row.values()] for row in tokens], np.int32)
    write_index(data, [*stage.columns, ID], lengths, [len(rows)])
    if stage.packs:
        write_packing(data, pack(lengths[:, 0], stage.max_length, stage.seed))
    return len(open_data(data))


def ours(
    size: Size,
    model: Path,
    stage: Any,
    rows: list[Row],
    folder: Path,
    profile: Path | None = None,
    patch: Callable[[], None] = lambda: None,
) -> Measured:
    """Applies `patch`, then trains with zephyr_ray's loop in this process."""
    from zephyr_ray.train.context import ProcessContext
    from zephyr_ray.train.job import Job
    from zephyr_ray.train.worker import make_trainer

    patch()
    meter = Meter(profile)
    order = stage.order(write_rows(stage, rows, folder))[: size.steps * stage.global_batch]
    job = Job(settings=stage, weights=str(model), folder=folder, order=order)
    trainer = make_trainer(job, ProcessContext(job.checkpoints))
    trainer.add_callback(meter)
    trainer.train()
    measured = [trainer.batches.data[row] for row in order[size.warmup * stage.global_batch :]]
    return meter.result(size, measured, 4 if stage.lora else 6, shared="prompt_ids" in rows[0])


def trl_sft(
    size: Size,
    model: Path,
    rows: list[Row],
    folder: Path,
    micro: int,
    packing: bool,
    checkpointing: bool,
) -> Measured:
    """Trains with TRL's SFTTrainer: bf16 autocast over fp32 weights, PyTorch's attention."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    meter = Meter()
    args = SFTConfig(
        **_arguments(size, folder, micro, size.sft_batch, checkpointing),
        max_length=size.sft_length,
        packing=packing,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    trainer = SFTTrainer(
        str(model),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[meter],
    )
    return _train(trainer, meter, size, size.sft_batch, per_parameter=6)


def trl_dpo(
    size: Size,
    model: Path,
    rows: list[Row],
    folder: Path,
    micro: int,
    precompute: bool,
    checkpointing: bool,
) -> Measured:
    """Trains with TRL's DPOTrainer on rows that are already tokenized."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    meter = Meter()
    args = DPOConfig(
        **_arguments(size, folder, micro, size.dpo_batch, checkpointing),
        max_length=size.dpo_length,
        precompute_ref_log_probs=precompute,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    trainer = Tokenized(
        str(model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[meter],
    )
    return _train(trainer, meter, size, size.dpo_batch, per_parameter=6 if precompute else 8)


def _arguments(
    size: Size, folder: Path, micro: int, batch: int, checkpointing: bool
) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": size.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "learning_rate": 5e-7,
        "warmup_steps": 1,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": checkpointing,
        # The rows are random already; sequential order tells which of them the steps measure.
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _train(trainer: Any, meter: Meter, size: Size, batch: int, per_parameter: float) -> Measured:
    trainer.train()
    rows = [
        trainer.train_dataset[at % len(trainer.train_dataset)]
        for at in range(size.warmup * batch, size.steps * batch)
    ]
    return meter.result(size, rows, per_parameter, shared=False)
