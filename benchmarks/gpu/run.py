"""Measures training on one GPU within a time budget: zephyr_ray against TRL. README.md in this
folder says how it is run.

    python -m benchmarks.gpu.run --out FOLDER --budget 480

Without a GPU it rehearses the same code with a tiny model.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# torch.cuda.is_available must not initialize CUDA before the processes are forked.
os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1"}
# A machine without a network has the loopback interface only.
os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch

from benchmarks import contestants
from benchmarks.gpu import attention
from benchmarks.gpu.losses import compare_losses
from benchmarks.isolated import Isolated
from benchmarks.report import Report
from benchmarks.workload import (
    BILLION,
    TINY,
    Size,
    dialogues,
    pairs,
    parameters,
    write_model,
)
from zephyr_ray.train import memory
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

GPU = torch.cuda.is_available()
SIZE = BILLION if GPU else TINY
LIMIT = 90
"""Seconds after which one training is given up."""


def main(out: Path, budget: float, bitsandbytes: str, only: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, budget)
    work = Path(tempfile.mkdtemp())
    losses = start_cpu_losses(work)
    import_libraries()
    isolated = Isolated(out / "log.txt")
    bench = Bench(report, isolated, work)
    report.section("machine", lambda: machine(report, isolated))
    report.section("model", bench.write_inputs)
    sections: list[tuple[str, Callable[[], Any]]] = [
        ("ceilings", lambda: report.line("ceilings", **isolated.run(ceilings, timeout=60))),
        ("attention", bench.attention),
        *bench.trainings(),
        ("losses", lambda: compare_losses(report, isolated, losses, work)),
        *bench.more_trainings(bitsandbytes),
    ]
    for name, measure in sections:
        if re.search(only, name):
            report.section(name, measure)
    losses.kill()
    shutil.rmtree(work, ignore_errors=True)


def import_libraries() -> None:
    """Imports what all processes need before they are forked."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    import zephyr_ray.train.trainer  # noqa: F401


def start_cpu_losses(work: Path) -> subprocess.Popen[bytes]:
    """Starts the training on the CPU in fp32 that a later section compares with."""
    program = [sys.executable, "-m", "benchmarks.gpu.losses", str(work / "cpu"), "fp32"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    with (work / "cpu.log").open("wb") as log:
        return subprocess.Popen(program, env=env, stdout=log, stderr=subprocess.STDOUT)


def machine(report: Report, isolated: Isolated) -> None:
    import accelerate
    import deepspeed
    import peft
    import transformers
    import triton
    import trl

    libraries = (torch, transformers, trl, deepspeed, accelerate, peft, triton)
    versions = {library.__name__: library.__version__ for library in libraries}
    card = "no GPU: a rehearsal with a tiny model"
    if GPU:
        query = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version",
            "--format=csv,noheader",
        ]
        card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    report.line(card, python=platform.python_version(), processes=isolated.method, **versions)
    report.line(f"model: {parameters(SIZE) / 1e9:.2f} B parameters", **SIZE.model)


def ceilings() -> dict[str, float]:
    """Measures the two limits of the card: TFLOP/s of a bf16 product of random matrices, and TB/s
    of a copy, reads and writes counted."""
    if not GPU:
        return {}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = attention.milliseconds(lambda: a @ b)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = attention.milliseconds(lambda: target.copy_(source))
    return {"bf16_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * 4 * 2**30 / copy / 1e9}


def unchanged() -> None:
    pass


class Bench:
    """The trainings, each in a process of its own."""

    def __init__(self, report: Report, isolated: Isolated, work: Path):
        self.report, self.isolated, self.work = report, isolated, work
        self.model = work / "model"

    def write_inputs(self) -> None:
        self.isolated.run(write_model, self.model, SIZE, "cuda" if GPU else "cpu", timeout=120)
        self.dialogues = dialogues(SIZE, SIZE.steps * SIZE.sft_batch * SIZE.sft_length)
        self.pairs = pairs(SIZE, SIZE.steps * SIZE.dpo_batch)

    def attention(self) -> None:
        for name, values in self.isolated.run(attention.check, timeout=60):
            self.report.line(name, **values)

    def trainings(self) -> list[tuple[str, Any]]:
        """The comparison with TRL, and profiles."""
        return [
            ("SFT ours, packed", partial(self.sft, micro=SIZE.micro)),
            ("SFT TRL as handbook", partial(self.trl_sft, 2 * SIZE.micro, False, True)),
            ("SFT TRL packed", partial(self.trl_sft, SIZE.micro, True, False)),
            ("SFT TRL unpacked, no checkpointing", partial(self.trl_sft, SIZE.micro, False, False)),
            ("DPO ours", partial(self.dpo, micro=2 * SIZE.micro)),
            ("DPO TRL as handbook", partial(self.trl_dpo, 2 * SIZE.micro, False, True)),
            ("DPO TRL at its best", partial(self.trl_dpo, 2 * SIZE.micro, True, False)),
            ("SFT ours, profiled", partial(self.sft, micro=SIZE.micro, profile="profile_sft.txt")),
            ("DPO ours, profiled", partial(self.dpo, 2 * SIZE.micro, profile="profile_dpo.txt")),
        ]

    def more_trainings(self, bitsandbytes: str) -> list[tuple[str, Any]]:
        """Other settings of ours."""
        micro, lora = SIZE.micro, {"r": 16, "dropout": 0.0}
        return [
            ("SFT ours, ZeRO 3", partial(self.sft, micro, zero=3)),
            ("DPO ours, ZeRO 3", partial(self.dpo, 2 * micro, zero=3)),
            ("SFT ours, checkpointing", partial(self.sft, micro, gradient_checkpointing=True)),
            ("DPO ours, checkpointing", partial(self.dpo, 2 * micro, gradient_checkpointing=True)),
            ("SFT ours, LoRA", partial(self.sft, micro, lora=lora)),
            ("DPO ours, LoRA", partial(self.dpo, 2 * micro, lora=lora)),
            ("SFT ours, micro-batch of one row", partial(self.sft, 1)),
            ("DPO ours, micro-batch of two pairs", partial(self.dpo, 2)),
            (
                "SFT ours, ZeRO 3, checkpointing",
                partial(self.sft, micro, zero=3, gradient_checkpointing=True),
            ),
            ("SFT ours, Liger", partial(self.sft, micro, patch=contestants.use_liger_kernels)),
            ("DPO ours, Liger", partial(self.dpo, 2 * micro, patch=contestants.use_liger_kernels)),
            ("SFT ours, twice the micro-batch", partial(self.sft, 2 * micro)),
            (
                "SFT ours, QLoRA",
                partial(self.sft, micro, lora=lora | {"quantized": True}, packages=bitsandbytes),
            ),
            ("SFT ours, compiled", partial(self.sft, micro, patch=contestants.compile_layers)),
        ]

    def sft(self, micro: int, **others: Any) -> None:
        self._ours(Sft, self.dialogues, micro, SIZE.sft_batch, SIZE.sft_length, **others)

    def dpo(self, micro: int, **others: Any) -> None:
        self._ours(Dpo, self.pairs, micro, SIZE.dpo_batch, SIZE.dpo_length, **others)

    def _ours(
        self,
        kind: Any,
        rows: Any,
        micro: int,
        batch: int,
        length: int,
        profile: str | None = None,
        patch: Any = unchanged,
        packages: str = "",
        **settings: Any,
    ) -> None:
        stage = kind(
            model="m",
            data="d",
            micro_batch=micro,
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
        self.report.training(measured, stage.batches()[0], planned(stage, SIZE))

    def trl_sft(self, micro: int, packing: bool, checkpointing: bool) -> None:
        self._largest(contestants.trl_sft, self.dialogues, micro, packing, checkpointing)

    def trl_dpo(self, micro: int, precompute: bool, checkpointing: bool) -> None:
        self._largest(contestants.trl_dpo, self.pairs, micro, precompute, checkpointing)

    def _largest(self, train: Any, rows: Any, micro: int, *flags: bool) -> None:
        """Measures the largest micro-batch of `micro`, half of it, … that fits."""
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
                return self.report.training(measured, micro)
            except Exception as error:
                if "OutOfMemoryError" not in str(error) or micro == 1:
                    raise
                micro //= 2

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.work))

    def _limit(self) -> float:
        return min(LIMIT, self.report.left)


def planned(stage: Any, size: Size) -> memory.Memory:
    """Returns what the planner expects on one GPU."""
    from zephyr_ray.models.shapes import shape_of

    shape = shape_of({"model_type": "llama", **size.model})
    return memory.worker_memory(stage, shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--only", default="", help="regular expression of the sections to run")
    parser.add_argument("--bitsandbytes", default="", help="folder that pip installed it in")
    main(**vars(parser.parse_args()))
