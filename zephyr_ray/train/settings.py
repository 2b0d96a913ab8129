"""Defines the settings of training stages, and derives steps and row order from them."""

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.settings import ADDED, OPERATIONAL, Reads, Strict
from zephyr_ray.stage import BoundedStage, Stage
from zephyr_ray.train.worker_count import WorkerCount

if TYPE_CHECKING:
    from zephyr_ray.train.objectives import Objective

BUCKET = 50_000_000
"""Maximum elements that DeepSpeed reduces or gathers at once."""
Schedule = Literal["cosine", "linear", "constant_with_warmup"]


class Lora(Strict):
    """Low-rank adapters on linear layers, merged into the saved model."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(16, ge=1)
    """The adapters' output is multiplied by alpha / r."""
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] | None = Field(None, min_length=1)
    """Names of the adapted modules; by default all linear layers except the output layer."""
    quantized: bool = False
    """QLoRA: initial weights in 4 bits (NF4, blocks of 64). Needs bitsandbytes and a GPU."""


class WorkerSettings(BoundedStage):
    """Settings of all stages that run a model on a group of workers. Workers and micro batch
    determine only how the result is computed."""

    sequences_per_row: ClassVar[int]
    """Token sequences per row, each of at most `max_length` tokens."""
    quantized_by: ClassVar[str]
    """Setting that quantizes the initial weights to 4 bits, as an error line names it."""

    model: Annotated[str, Reads("weights")]
    data: str
    max_length: int = Field(ge=16)
    """Maximum tokens per sequence."""
    bad_rows: Annotated[Literal["drop", "stop"], ADDED] = "drop"
    """Whether a row whose loss mask cannot be proven is dropped and counted, or stops the stage."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of matrix products; weights, gradients and optimizer state are always fp32."""
    zero: Annotated[Literal[0, 1, 2, 3], OPERATIONAL] = 3
    """DeepSpeed's ZeRO stage: what is split over workers. 0 nothing, 1 the optimizer state, 2 also
    gradients, 3 also weights."""
    workers: Annotated[WorkerCount, OPERATIONAL] = WorkerCount.fixed(1)
    """Number of workers, or `{least: …, most: …}`: as many as the cluster has room for. When one is
    lost or added, training continues from the last checkpoint with the new number."""
    cpus_per_worker: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """CPUs per worker; without a GPU also its number of threads."""
    gpus_per_worker: Annotated[int, OPERATIONAL] = Field(0, ge=0, le=1)
    micro_batch: Annotated[int, OPERATIONAL] = Field(8192, ge=1)
    """Maximum tokens per forward pass on one worker, padding included; at least the longest row."""
    offload: Annotated[Literal["none", "optimizer", "all"], OPERATIONAL] = "none"
    """Part of a worker's share kept in CPU memory, not on the GPU: the optimizer state (zero 1 to
    3), or also the weights (zero 3)."""

    def is_quantized(self) -> bool:
        """Returns whether the initial weights are in 4 bits."""
        return False

    @property
    def longest_row(self) -> int:
        """Maximum tokens of a row."""
        return self.sequences_per_row * self.max_length

    @property
    def largest_pass(self) -> int:
        """Maximum tokens of a forward pass on one worker."""
        return self.micro_batch

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        row = self.longest_row
        if self.micro_batch < row:
            # A value below the smallest max_length is probably meant as a number of rows.
            rows = self.micro_batch if self.micro_batch < 16 else 1
            count = f"{rows} rows" if rows > 1 else "one row"
            raise Permanent(
                f"micro_batch {self.micro_batch} is less than the {row} tokens of the longest row; "
                f"it counts tokens: for {count} of {row} tokens, write {rows * row}"
            )
        quantized = self.is_quantized()
        if quantized and not self.gpus_per_worker:
            raise Permanent(f"{self.quantized_by} needs a GPU: set gpus_per_worker: 1")
        if quantized and self.zero == 3:
            raise Permanent(
                f"{self.quantized_by}: ZeRO stage 3 cannot split 4-bit weights; set zero: 2"
            )
        if self.offload != "none" and self.zero == 0 or self.offload == "all" and self.zero != 3:
            zero = 3 if self.offload == "all" else 2
            raise Permanent(
                f"offload: {self.offload} does not work with zero: {self.zero}; set zero: {zero}"
            )

    def memory_savings(self, largest: int | None = None, more: str = "") -> str:
        """Returns the settings that lower the memory of workers, as an error line names them.

        `largest` is the largest `micro_batch` that fits, if known; `more` names other settings.
        """
        to = f" to {largest}" if largest else ""
        names = [f"micro_batch{to}"] if self.largest_pass > self.longest_row else []
        names += ["workers"] if self.workers.most > 1 and not self.gpus_per_worker else []
        lower = f"{', '.join(names)} or max_length" if names else "max_length"
        return f"lower {lower}, {more}or use a smaller model"

    def forward_config(self) -> dict[str, Any]:
        """Returns the DeepSpeed configuration of forward passes.

        `torch_autocast` keeps weights in fp32; rounding them to bf16 between stages would lose the
        small updates of preference training.
        """
        offloaded = {"offload_param": self._in_cpu_memory} if self.offload == "all" else {}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": self.zero,
                # The default of 5e8 elements would hold 2 GB of fp32 gradients per worker.
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "stage3_gather_16bit_weights_on_model_save": True,
                **offloaded,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # DeepSpeed's own timer would wait for the GPU before every forward pass.
            "timers": {"throughput": {"enabled": False}},
            "torch_autocast": {"enabled": self.precision == "bf16", "dtype": "bfloat16"},
        }

    @property
    def _in_cpu_memory(self) -> dict[str, Any]:
        return {"device": "cpu", "pin_memory": self.gpus_per_worker > 0}


class TrainingSettings(WorkerSettings):
    """Settings shared by all training stages. The global batch determines the result."""

    makes: ClassVar[str] = "weights"
    trains_model: ClassVar[bool] = True
    quantized_by: ClassVar[str] = "lora.quantized"
    proven: ClassVar[str]
    """Column of `data` with the conversation whose loss mask is shown."""

    learning_rate: float = Field(gt=0)
    schedule: Schedule
    epochs: float = Field(gt=0)
    global_batch: int = Field(ge=1)
    """Rows (packed sequences, pairs) per optimizer step, over all workers."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Fraction of the steps during which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum L2 norm of the gradients, over all parameters; larger ones are scaled down to it."""
    lora: Lora | None = None
    seed: int = 0
    """Seed of the row order, packing, dropout and adapter initialization."""
    gradient_checkpointing: Annotated[bool, OPERATIONAL] = False
    """Stores one activation per layer and recomputes the rest in the backward pass."""
    optimizer: Annotated[Literal["adamw", "paged_adamw_32bit"], OPERATIONAL] = "adamw"
    """Both compute the same update. The paged one moves its state to CPU memory when GPU memory is
    full; it needs bitsandbytes and a GPU."""
    checkpoint_every: Annotated[int, OPERATIONAL] = Field(50, ge=1)
    """Optimizer steps between two checkpoints."""
    validation: Annotated[str | float | None, ADDED] = None
    """Rows to measure the model on: a stage that makes the same type as `data`, or the share of the
    prompts of `data` (between 0 and 1) whose rows are not trained on."""
    validate_every: Annotated[int, OPERATIONAL] = Field(100, ge=1)
    """Optimizer steps between two measurements; the first is before training, the last at its
    end."""

    def objective(self) -> "Objective":
        """Returns the loss and metrics; called in a worker, because it imports PyTorch and TRL."""
        raise NotImplementedError

    def is_quantized(self) -> bool:
        return self.lora is not None and self.lora.quantized

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        most = self.workers.most
        if most > self.global_batch:
            raise Permanent(
                f"global_batch {self.global_batch} has no row for each of {most} workers; "
                f"set workers: {self.global_batch}"
            )
        self._check_validation(reads)
        super().check(files, reads)
        if self.optimizer != "adamw" and not self.gpus_per_worker:
            raise Permanent(f"optimizer: {self.optimizer} needs a GPU: set gpus_per_worker: 1")

    def split(self, rows: dict[str, int]) -> tuple[int | None, int | None]:
        """Returns the expected rows to train on and to validate on, from the rows of the stages it
        reads; None if unknown."""
        count = rows.get(self.data)
        if isinstance(self.validation, str):
            return count, rows.get(self.validation)
        held_out = count and round(count * (self.validation or 0))
        return count and count - (held_out or 0), held_out

    def _check_validation(self, reads: dict[str, Stage]) -> None:
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise Permanent(
                f"validation: {self.validation:g} is not a share; write a number between 0 and 1, "
                "or the name of a stage"
            )
        if isinstance(self.validation, str) and reads[self.validation] == reads[self.data]:
            raise Permanent(
                f"validation: '{self.validation}' is what the stage trains on; name other data, "
                "or write a share of it, such as 0.05"
            )

    def memory_savings(self, largest: int | None = None, more: str = "") -> str:
        checkpointing = "" if self.gradient_checkpointing else "set gradient_checkpointing: true, "
        return super().memory_savings(largest, checkpointing + more)

    @property
    def largest_pass(self) -> int:
        return min(self.micro_batch, self.step_tokens)

    @property
    def step_tokens(self) -> int:
        """Maximum tokens per step on one worker, with the fewest workers."""
        return math.ceil(self.global_batch / self.workers.least) * self.longest_row

    @property
    def reference_flops(self) -> int:
        """FLOPs per parameter and token of this stage's pass of the reference model, once per
        run."""
        return 0

    @property
    def packs(self) -> bool:
        """Whether sequences hold several rows."""
        return False

    def order(self, rows: int) -> list[int]:
        """Returns row numbers in training order: full steps, the same for any number of workers.

        Each epoch is shuffled anew; rows of one more epoch fill the last step.
        """
        steps = max(1, math.ceil(self.epochs * rows / self.global_batch))
        shuffle = random.Random(self.seed)
        order: list[int] = []
        while len(order) < steps * self.global_batch:
            epoch = list(range(rows))
            shuffle.shuffle(epoch)
            order += epoch
        return order[: steps * self.global_batch]

    def deepspeed(self) -> dict[str, Any]:
        """Returns the DeepSpeed configuration of training."""
        config = self.forward_config()
        if self.offload != "none":
            config["zero_optimization"]["offload_optimizer"] = self._in_cpu_memory
        by_trainer = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "train_batch_size",
            "gradient_clipping",
        )
        return config | dict.fromkeys(by_trainer, "auto")
