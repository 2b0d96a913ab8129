"""What every training stage is told, and what follows from it: batches, steps and their order."""

import math
import random
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.settings import OPERATIONAL, Reads, Strict
from zephyr_ray.stage import Stage

BUCKET = 50_000_000
"""Elements that DeepSpeed reduces or gathers at once."""


class Lora(Strict):
    """Low-rank adapters on the linear layers; merged into the saved model."""

    r: int = Field(16, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] | None = None
    """Names of the adapted modules; every linear layer but the output layer where absent."""
    quantized: bool = False
    """QLoRA: the start weights in 4 bits (NF4, blocks of 64); needs bitsandbytes and a GPU."""


class TrainingSettings(Stage):
    """Settings shared by sft and dpo. The global batch is the unit: it fixes the result, while
    workers and micro batch only say how it is computed."""

    makes: ClassVar[str] = "weights"
    unit: ClassVar[str]
    """What one row of training is, in the plural: `global_batch` and the rates count these."""
    sequences_per_row: ClassVar[int]
    """Token sequences of up to `max_length` in one row."""

    model: Annotated[str, Reads("weights")]
    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"]
    epochs: float = Field(gt=0)
    global_batch: int = Field(ge=1)
    """Rows (packed sequences, pairs) of one optimiser step, over all workers."""
    max_length: int = Field(ge=16)
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the matrix products; weights, gradients and optimiser state stay in fp32."""
    lora: Lora | None = None
    seed: int = 0
    zero: Annotated[Literal[0, 1, 2, 3], OPERATIONAL] = 3
    """DeepSpeed's ZeRO stage: what is split over the workers."""
    workers: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    cpus_per_worker: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """Without a GPU, also the worker's threads."""
    gpus_per_worker: Annotated[int, OPERATIONAL] = Field(0, ge=0, le=1)
    micro_batch: Annotated[int, OPERATIONAL] = Field(4, ge=1)
    """Most rows of one forward pass on one worker."""
    gradient_checkpointing: Annotated[bool, OPERATIONAL] = False
    """Keeps one activation a layer, and computes the others again on the way back."""
    offload: Annotated[Literal["none", "optimizer", "all"], OPERATIONAL] = "none"
    """What of a worker's share lies in its node's memory and not on its GPU: the optimiser (zero 1
    to 3), or the weights too (zero 3)."""
    optimizer: Annotated[Literal["adamw", "paged_adamw_32bit"], OPERATIONAL] = "adamw"
    """The same update; the paged one (bitsandbytes, a GPU) moves its state out when memory ends."""
    checkpoint_every: Annotated[int, OPERATIONAL] = Field(50, ge=1)
    """Steps."""

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        self.batches()
        quantized = self.lora is not None and self.lora.quantized
        if (quantized or self.optimizer != "adamw") and not self.gpus_per_worker:
            what = "lora.quantized" if quantized else f"optimizer: {self.optimizer}"
            raise Permanent(f"{what} needs a GPU: set gpus_per_worker: 1")
        if quantized and self.zero == 3:
            raise Permanent("lora.quantized: weights of 4 bits cannot be split; set zero: 2")
        if self.offload != "none" and self.zero == 0 or self.offload == "all" and self.zero != 3:
            least = 3 if self.offload == "all" else 2
            raise Permanent(f"offload: {self.offload} needs zero: {least}, not zero: {self.zero}")

    def batches(self) -> tuple[int, int]:
        """(rows of one forward pass on one worker, forward passes per step)."""
        share, rest = divmod(self.global_batch, self.workers)
        if rest:
            raise Permanent(
                f"global_batch {self.global_batch} cannot be split over {self.workers} workers; "
                f"choose workers that divide it, or global_batch {self.workers * (share + 1)}"
            )
        micro = max(n for n in range(1, min(self.micro_batch, share) + 1) if share % n == 0)
        return micro, share // micro

    def order(self, lengths: list[int]) -> list[int]:
        """Row indices in the order of training: whole steps of `global_batch`, the same for any
        number of workers. A last step that the epochs leave half empty is filled from another
        shuffle. Within a step, which is one sum, rows of like length stand together."""
        steps = max(1, math.ceil(self.epochs * len(lengths) / self.global_batch))
        shuffle = random.Random(self.seed)
        stream: list[int] = []
        while len(stream) < steps * self.global_batch:
            epoch = list(range(len(lengths)))
            shuffle.shuffle(epoch)
            stream += epoch
        batches = (
            stream[at : at + self.global_batch] for at in range(0, len(stream), self.global_batch)
        )
        ordered: list[int] = []
        for _, batch in zip(range(steps), batches, strict=False):
            ordered += sorted(batch, key=lambda row: -lengths[row])
        return ordered

    def deepspeed(self) -> dict[str, Any]:
        """The DeepSpeed configuration. `torch_autocast` keeps fp32 weights: weights rounded to
        bf16 between stages would lose the small updates of preference training."""
        host = {"device": "cpu", "pin_memory": self.gpus_per_worker > 0}
        moved = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}
        return {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {
                "stage": self.zero,
                # Elements; the default of 5e8 would hold 2 GB of fp32 gradients a worker.
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "stage3_gather_16bit_weights_on_model_save": True,
                **{f"offload_{part}": host for part in moved[self.offload]},
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": self.precision == "bf16", "dtype": "bfloat16"},
        }
