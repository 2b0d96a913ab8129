"""Measures training on one GPU within a time budget: zephyr_ray against TRL. See README.md in this
folder.

    python -m benchmarks.gpu.run --out FOLDER --budget 480

Without a GPU it runs the same code with a tiny model.
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
# A machine without a network has only the loopback interface.
os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch

from benchmarks.gpu import attention
from benchmarks.gpu.losses import compare_losses
from benchmarks.gpu.training_runs import GPU, SIZE, TrainingRuns
from benchmarks.isolated import Isolated
from benchmarks.report import Report
from benchmarks.workload import parameters


def main(out: Path, budget: float, bitsandbytes: str, only: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, budget)
    work = Path(tempfile.mkdtemp())
    cpu_training = start_cpu_training(work)
    import_libraries()
    isolated = Isolated(out / "log.txt")
    training_runs = TrainingRuns(report, isolated, work)
    compare_with_cpu = partial(compare_losses, report, isolated, cpu_training, work)
    report.section("machine", lambda: machine(report, isolated))
    report.section("model", training_runs.write_inputs)
    sections: list[tuple[str, Callable[[], Any]]] = [
        ("ceilings", lambda: report.line("ceilings", **isolated.run(ceilings, timeout=60))),
        ("attention", lambda: check_attention(report, isolated)),
        *training_runs.against_trl(),
        *training_runs.with_expandable_segments(),
        ("losses", compare_with_cpu),
        *training_runs.with_other_settings(bitsandbytes),
    ]
    for name, measure in sections:
        if re.search(only, name):
            report.section(name, measure)
    cpu_training.kill()
    shutil.rmtree(work, ignore_errors=True)


def import_libraries() -> None:
    """Imports, before any fork, the libraries that every process needs."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    import zephyr_ray.train.trainer  # noqa: F401


def start_cpu_training(work: Path) -> subprocess.Popen[bytes]:
    """Starts fp32 training on the CPU; a later section compares the GPU's losses with it."""
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
    card = "no GPU, smoke test with a tiny model"
    if GPU:
        query = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version",
            "--format=csv,noheader",
        ]
        card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    report.line(card, python=platform.python_version(), processes=isolated.method, **versions)
    report.line(f"model: {parameters(SIZE) / 1e9:.2f} B parameters", **SIZE.model)


def check_attention(report: Report, isolated: Isolated) -> None:
    for name, values in isolated.run(attention.check, timeout=60):
        report.line(name, **values)


def ceilings() -> dict[str, float]:
    """Measures the two limits of the card: TFLOP/s of a bf16 product of random matrices, and TB/s
    of a copy, counting reads and writes."""
    if not GPU:
        return {}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = attention.milliseconds(lambda: a @ b)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = attention.milliseconds(lambda: target.copy_(source))
    return {"bf16_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * 4 * 2**30 / copy / 1e9}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--only", default="", help="regular expression of the sections to run")
    parser.add_argument("--bitsandbytes", default="", help="folder where pip installed it")
    main(**vars(parser.parse_args()))
