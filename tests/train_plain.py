"""Runs pickled training jobs without Ray, as a plain process or as a torchrun worker."""

import pickle
import sys
from pathlib import Path

from zephyr_ray.train.context import ProcessContext
from zephyr_ray.train.worker import train_and_save

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        job = pickle.loads(path.read_bytes())
        train_and_save(job, ProcessContext(job.checkpoints))
        from accelerate.state import AcceleratorState

        # Otherwise the next job would get this one's DeepSpeed configuration.
        AcceleratorState._reset_state(reset_partial_state=True)
