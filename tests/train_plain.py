"""Runs a pickled training job without Ray: as a plain process, or as one of torchrun's."""

import pickle
import sys
from pathlib import Path

from zephyr_ray.train.context import ProcessContext
from zephyr_ray.train.worker import train_and_save

if __name__ == "__main__":
    job = pickle.loads(Path(sys.argv[1]).read_bytes())
    train_and_save(job, ProcessContext(job.checkpoints))
