"""Defines shared fixtures: a tiny random Llama with a ChatML tokenizer, and a small Ray cluster."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_lab import api, here  # noqa: F401
from serving import Service, served
from xdist.scheduler import LoadFileScheduling

os.environ["RAY_AUTH_MODE"] = "disabled"
# Pytest is not run by uv; without this, Ray may copy the complete checkout to its workers.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

SLOW_FILES = [
    "test_pipeline.py",
    "test_serve.py",
    "test_train.py",
    "test_resharding.py",
    "test_validation.py",
    "test_split_steps.py",
    "test_openai.py",
    "test_rows.py",
]
"""Files that take minutes; they start first, so that none runs alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (SLOW_FILES + [item.path.name]).index(item.path.name))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Names the groups of tests that -m excludes; -ra lists skipped tests, but not these."""
    for marker in config.getini("markers"):
        if f"not {marker.partition(':')[0]}" in config.option.markexpr:
            terminalreporter.line(f"NOT RUN {marker}")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return FileScheduling(config, log)


class FileScheduling(LoadFileScheduling):
    """Runs each file in one process, because fixtures are expensive; the two files that share a
    service run in the same process."""

    def _split_scope(self, nodeid: str) -> str:
        return super()._split_scope(nodeid).replace("test_page.py", "test_serve.py")


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a random fp32 Llama with context 512 and head size 32 (required by vLLM on a CPU)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    from zephyr_ray.chat import CHATML

    folder = tmp_path_factory.mktemp("tiny_model")
    seeds = Path(__file__).resolve().parents[1] / "configs" / "seeds"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [path.read_text(encoding="utf-8") for path in sorted(seeds.glob("*.jsonl"))],
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHATML,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
        initializer_range=0.1,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Starts a Ray cluster with four logical CPUs, whatever the machine has."""
    import ray

    ray.init(
        address="local",  # do not join a cluster already running on this machine
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tiny_model, tmp_path_factory.mktemp("serve")) as running:
        yield running
