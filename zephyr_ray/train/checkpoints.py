"""Reads and removes what a folder of checkpoints holds."""

import shutil
from pathlib import Path

RAY_RECORD = "checkpoint_manager_snapshot.json"
"""File in which Ray Train lists the checkpoints that all workers reported."""
RECORD = "last_checkpoint"
"""File with the name of the last checkpoint that all workers reported without Ray."""
UNFIT = (
    "the last checkpoint is missing or was written at another ZeRO stage; training starts from "
    "step 1"
)
"""Warning if the last checkpoint does not fit."""


def remove_checkpoints(folder: Path, keep: str | None) -> None:
    """Removes all checkpoints in the folder except the one named `keep`. If it is None, removes
    the records too."""
    # Records first: a kill must not leave one that names a missing checkpoint.
    for record in () if keep else (RAY_RECORD, RECORD):
        (folder / record).unlink(missing_ok=True)
    for path in folder.glob("checkpoint-*"):
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def fits(checkpoint: Path, zero: int) -> bool:
    """Returns whether a training at this ZeRO stage can resume from a checkpoint: it exists, and
    was written at the same stage."""
    is_complete = (checkpoint / "latest").exists()
    return is_complete and written_by(checkpoint)[0] == (2 if zero == 1 else zero)


def written_by(checkpoint: Path) -> tuple[int, int]:
    """Returns the ZeRO stage (2 also for 1, which is written in the same way) and the number of
    workers of a checkpoint. Without ZeRO (0), its state is not split: 1 worker."""
    folder = state_folder(checkpoint)
    optimizers = len(list(folder.glob("*_optim_states.pt")))
    models = len(list(folder.glob("zero_pp_rank_*_model_states.pt")))
    return (3 if models else 2 if optimizers else 0), optimizers or 1


def state_folder(checkpoint: Path) -> Path:
    """Returns the folder of the state, which DeepSpeed names last."""
    return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
