"""Lists the training runs that are measured, each in its own process, in order of importance."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import contestants
from benchmarks.gpu import switches
from benchmarks.isolated import Isolated
from benchmarks.report import Report
from benchmarks.workload import (
    BILLION,
    TINY,
    Size,
    dialogues,
    longest_pairs,
    pairs,
    write_model,
)
from zephyr_ray.train import memory
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

GPU = torch.cuda.is_available()
SIZE = BILLION if GPU else TINY
LIMIT = 90
"""Maximum seconds per training run; a longer one is killed."""


class TrainingRuns:
    """The training runs of one benchmark."""

    def __init__(self, report: Report, isolated: Isolated, work: Path):
        self.report, self.isolated, self.work = report, isolated, work
        self.model = work / "model"

    def write_inputs(self) -> None:
        self.isolated.run(write_model, self.model, SIZE, "cuda" if GPU else "cpu", timeout=120)
        self.dialogues = dialogues(SIZE, SIZE.steps * SIZE.sft_batch * SIZE.sft_length)
        self.pairs = pairs(SIZE, SIZE.steps * SIZE.dpo_batch)

    def against_trl(self) -> list[tuple[str, Any]]:
        """Returns the runs that compare us with TRL, and two profiled runs of ours."""
        micro = SIZE.micro
        return [
            ("SFT ours, packed", partial(self.sft, micro)),
            ("SFT TRL as handbook", partial(self.trl_sft, 2 * micro, False, True)),
            ("SFT TRL packed", partial(self.trl_sft, micro, True, False)),
            ("SFT TRL unpacked, no checkpointing", partial(self.trl_sft, micro, False, False)),
            ("DPO ours", partial(self.dpo, 2 * micro)),
            ("DPO TRL as handbook", partial(self.trl_dpo, 2 * micro, False, True)),
            ("DPO TRL at its best", partial(self.trl_dpo, 2 * micro, True, False)),
            ("SFT ours, profiled", partial(self.sft, micro, profile="profile_sft.txt")),
            ("DPO ours, profiled", partial(self.dpo, 2 * micro, profile="profile_dpo.txt")),
        ]

    def with_expandable_segments(self) -> list[tuple[str, Any]]:
        """Returns our runs with PyTorch's expandable segments, also with larger micro-batches and a
        larger global batch."""
        sft, dpo, micro = self.sft, self.dpo, SIZE.micro
        growing = switches.expandable_segments
        return [
            ("DPO ours, expandable segments", partial(dpo, 2 * micro, patch=growing)),
            ("SFT ours, twice the micro-batch", partial(sft, 2 * micro, patch=growing)),
            ("DPO ours, twice the micro-batch", partial(dpo, 4 * micro, patch=growing)),
            ("SFT ours, four times the micro-batch", partial(sft, 4 * micro, patch=growing)),
            (
                "SFT ours, also twice the global batch",
                partial(self.double_global_batch, 4 * micro, growing),
            ),
        ]

    def with_other_settings(self, bitsandbytes: str) -> list[tuple[str, Any]]:
        """Returns our runs with ZeRO-3, LoRA, QLoRA, checkpointing, other micro-batches, the
        longest pairs, and compiled parts or layers."""
        micro, lora = SIZE.micro, {"r": 16, "dropout": 0.0}
        sft, dpo = self.sft, self.dpo
        saving = {"zero": 3, "gradient_checkpointing": True}
        quantized = {"lora": lora | {"quantized": True}, "packages": bitsandbytes}
        return [
            ("DPO ours, longest pairs", partial(self.longest, 2 * micro)),
            (
                "SFT ours, ZeRO 3, profiled",
                partial(sft, micro, zero=3, profile="profile_zero3.txt"),
            ),
            ("SFT ours, QLoRA", partial(sft, micro, **quantized)),
            ("DPO ours, micro-batch for two longest pairs", partial(dpo, 2)),
            ("SFT ours, ZeRO 3", partial(sft, micro, zero=3)),
            ("DPO ours, ZeRO 3", partial(dpo, 2 * micro, zero=3)),
            ("SFT ours, checkpointing", partial(sft, micro, gradient_checkpointing=True)),
            ("DPO ours, checkpointing", partial(dpo, 2 * micro, gradient_checkpointing=True)),
            ("SFT ours, LoRA", partial(sft, micro, lora=lora)),
            ("DPO ours, LoRA", partial(dpo, 2 * micro, lora=lora)),
            ("SFT ours, micro-batch for one row", partial(sft, 1)),
            ("SFT ours, ZeRO 3, checkpointing", partial(sft, micro, **saving)),
            # Compilation may use up a run's time limit, so these are last.
            ("SFT ours, compiled parts", partial(sft, micro, patch=switches.compiled_parts)),
            ("DPO ours, compiled parts", partial(dpo, 2 * micro, patch=switches.compiled_parts)),
            ("SFT ours, compiled layers", partial(sft, micro, patch=switches.compiled_layers)),
        ]

    def sft(self, micro: int, **others: Any) -> None:
        self._ours(Sft, self.dialogues, micro, SIZE.sft_batch, SIZE.sft_length, **others)

    def dpo(self, micro: int, **others: Any) -> None:
        self._ours(Dpo, self.pairs, micro, SIZE.dpo_batch, SIZE.dpo_length, **others)

    def double_global_batch(self, micro: int, patch: Any) -> None:
        batch = 2 * SIZE.sft_batch
        self._ours(Sft, self.dialogues, micro, batch, SIZE.sft_length, patch=patch)

    def longest(self, micro: int, **others: Any) -> None:
        rows = longest_pairs(SIZE, SIZE.steps * SIZE.dpo_batch)
        self._ours(Dpo, rows, micro, SIZE.dpo_batch, SIZE.dpo_length, **others)

    def _ours(
        self,
        kind: Any,
        rows: Any,
        micro: int,
        batch: int,
        length: int,
        profile: str | None = None,
        patch: Any = switches.unchanged,
        packages: str = "",
        **settings: Any,
    ) -> None:
        """Measures a run of ours, with as many tokens per micro-batch as `micro` rows can have."""
        stage = kind(
            model="m",
            data="d",
            micro_batch=micro * kind.sequences_per_row * length,
            global_batch=batch,
            max_length=length,
            gpus_per_worker=int(GPU),
            epochs=2,
            checkpoint_every=10_000,
            **{"zero": 0, **settings},
        )
        file = profile and self.report.folder / profile
        measured = self.isolated.run(
            contestants.ours,
            SIZE,
            self.model,
            stage,
            rows,
            self._folder(),
            file,
            patch,
            timeout=self._limit(),
            packages=packages,
        )
        self.report.training(measured, f"{stage.micro_batch} tokens", planned(stage, SIZE))

    def trl_sft(self, micro: int, packing: bool, checkpointing: bool) -> None:
        self._largest(contestants.trl_sft, self.dialogues, micro, packing, checkpointing)

    def trl_dpo(self, micro: int, precompute: bool, checkpointing: bool) -> None:
        self._largest(contestants.trl_dpo, self.pairs, micro, precompute, checkpointing)

    def _largest(self, train: Any, rows: Any, micro: int, *flags: bool) -> None:
        """Measures TRL with `micro` rows per micro-batch, halved until they fit in memory."""
        while True:
            try:
                measured = self.isolated.run(
                    train,
                    SIZE,
                    self.model,
                    rows,
                    self._folder(),
                    micro,
                    *flags,
                    timeout=self._limit(),
                )
                return self.report.training(measured, f"{micro} rows")
            except Exception as error:
                if "OutOfMemoryError" not in str(error) or micro == 1:
                    raise
                micro //= 2

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.work))

    def _limit(self) -> float:
        return min(LIMIT, self.report.left)


def planned(stage: Any, size: Size) -> memory.Memory:
    """Returns the planner's memory estimate for one GPU."""
    from zephyr_ray.models.shapes import shape_of

    shape = shape_of({"model_type": "llama", **size.model})
    return memory.worker_memory(stage, shape)
