"""Trains a small model for 20 steps, to compare a GPU's losses in bf16 and fp32 with a
CPU's in fp32.

python -m benchmarks.gpu.losses FOLDER fp32
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.switches import unchanged
from benchmarks.workload import TINY, dialogues, pairs, write_model
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

SMALL = replace(
    TINY,
    model={
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    sft_length=256,
    dpo_length=192,
    steps=20,
)


def losses(
    folder: Path, kind: str, precision: str, gpus: int, patch: Callable[[], None] = unchanged
) -> list[float]:
    """Trains in this process; returns the loss of every step."""
    from benchmarks.contestants import ours

    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", SMALL, "cpu")
    common = {"model": "m", "data": "d", "zero": 0, "epochs": 5, "precision": precision}
    common |= {"gpus_per_worker": gpus, "micro_batch": 512, "learning_rate": 5e-4}
    common |= {"checkpoint_every": 10_000}
    if kind == "sft":
        stage: Any = Sft(**common, global_batch=SMALL.sft_batch, max_length=SMALL.sft_length)
        rows = dialogues(SMALL, 8 * SMALL.sft_batch * SMALL.sft_length)
    else:
        stage = Dpo(**common, global_batch=SMALL.dpo_batch, max_length=SMALL.dpo_length)
        rows = pairs(SMALL, 8 * SMALL.dpo_batch)
    return ours(SMALL, folder / "model", stage, rows, folder / "made", patch=patch).losses


def compare_losses(
    report: Any,
    isolated: Any,
    cpu_training: subprocess.Popen[bytes],
    work: Path,
    precisions: tuple[str, ...] = ("bf16", "fp32"),
    patch: Callable[[], None] = unchanged,
) -> None:
    """Trains on the GPU; reports the largest and the first difference from the CPU's losses, per
    stage kind and precision."""
    import torch

    cpu_training.wait(timeout=60)
    expected = json.loads((work / "cpu" / "losses.json").read_text(encoding="utf-8"))
    gpus = int(torch.cuda.is_available())
    for kind in ("sft", "dpo"):
        for precision in precisions:
            folder = Path(tempfile.mkdtemp(dir=work))
            actual = isolated.run(losses, folder, kind, precision, gpus, patch, timeout=60)
            differences = [abs(a - b) for a, b in zip(actual, expected[kind], strict=True)]
            report.line(
                f"{kind}, {len(actual)} steps, {precision} against fp32 on the CPU",
                kernels=patch.__name__,
                largest_difference=max(differences),
                first_difference=differences[0],
                cpu_first_loss=expected[kind][0],
                cpu_last_loss=expected[kind][-1],
            )


if __name__ == "__main__":
    folder, precision = Path(sys.argv[1]), sys.argv[2]
    both = {kind: losses(folder / kind, kind, precision, gpus=0) for kind in ("sft", "dpo")}
    (folder / "losses.json").write_text(json.dumps(both), encoding="utf-8")
