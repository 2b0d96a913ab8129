"""What every training stage is told, and what follows from it: batches, steps and their order."""

import math
import random
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.recipe import OPERATIONAL, Reads, Stage, Strict


class Lora(Strict):
    """Low-rank adapters on the linear layers; merged into the saved model."""

    r: int = Field(16, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] | None = None
    """Names of the adapted modules; every linear layer but the output layer where absent."""


class TrainingSettings(Stage):
    """Settings shared by sft and dpo. The global batch is the unit: it fixes the result, while
    workers and micro batch only say how it is computed."""

    makes: ClassVar[str] = "weights"

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
    checkpoint_every: Annotated[int, OPERATIONAL] = Field(50, ge=1)
    """Steps."""

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        self.batches()

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
        return {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {
                "stage": self.zero,
                # Elements; the default of 5e8 would hold 2 GB of fp32 gradients a worker.
                "reduce_bucket_size": 50_000_000,
                "allgather_bucket_size": 50_000_000,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": self.precision == "bf16", "dtype": "bfloat16"},
        }
