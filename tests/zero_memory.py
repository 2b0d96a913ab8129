"""Measures the memory of two workers at each ZeRO stage. test_estimate.py runs this as a program.

Prints one JSON line per stage: bytes held after a step, and the peak during a step, on rank 0.
"""

import gc
import importlib
import json
import os
import sys
from typing import Any

from zephyr_ray.train.sft import Sft

MODEL = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
BUCKET = 100_000
"""Small relative to the model, as `settings.BUCKET` is relative to 7B parameters."""


def settings(zero: int, offload: str = "none") -> Sft:
    return Sft(model="m", data="d", zero=zero, workers=2, offload=offload, global_batch=2)


def peak_bytes(work: Any) -> int:
    """Returns the peak bytes that `work` adds in PyTorch's CPU allocator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def held_bytes() -> int:
    """Returns the bytes of all storages that live tensors refer to."""
    import torch

    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def worker(rank: int, stages: list[tuple[int, str]], port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    import torch

    torch.set_num_threads(1)
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.build_shm_op = lambda: None
    import deepspeed

    deepspeed.init_distributed("gloo")
    for zero, offload in stages:
        measured = measure(zero, offload)
        if rank == 0:
            print(json.dumps({"zero": zero, "offload": offload, **measured}), flush=True)
        torch.distributed.barrier()


def measure(zero: int, offload: str) -> dict[str, int]:
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    before = held_bytes()
    config = settings(zero, offload).deepspeed()
    config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"train_batch_size": 2, "gradient_clipping": 1.0}
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=zero == 3):
        model = LlamaForCausalLM(LlamaConfig(**MODEL, use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.arange(8)[None]  # few tokens, so that activations are negligible

    def step() -> None:
        engine.backward(engine(ids, labels=ids).loss)
        engine.step()

    step()
    held = held_bytes() - before
    measured = {"held": held, "peak": held + peak_bytes(step)}
    engine.destroy()
    return measured


if __name__ == "__main__":
    import torch

    stages = [(int(zero), offload) for zero, offload in (a.split(":") for a in sys.argv[2:])]
    torch.multiprocessing.spawn(worker, (stages, int(sys.argv[1])), nprocs=2)
