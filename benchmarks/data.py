"""Measures how training rows are prepared: tokens per second, and the driver's peak memory.

    flock LOCK .venv/bin/python -m benchmarks.data --out FOLDER [--dialogues 20000 200000]

Compares the preparation of this version (one process; Ray Data with one and with two tasks) with
that of earlier versions: all rows in the driver, one after another, each turn tokenized as one
text. Then runs the sft stage of configs/zephyr-7b-paper.yaml with a tiny model up to its first
step, for each number of dialogues. Each measurement runs in its own process. Takes 10 minutes on
two cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import psutil
import yaml

from zephyr_ray import blocks
from zephyr_ray.chat import ChatFormat
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import answers
from zephyr_ray.models.weights import resolve
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact
from zephyr_ray.train import preparation
from zephyr_ray.train.model import load_chat
from zephyr_ray.train.sft import IGNORED, Sft

TOKENIZER = "smollm2-135m-instruct"
RECIPE = Path(__file__).parents[1] / "configs" / "zephyr-7b-paper.yaml"
WARM_UP = 2000
"""Dialogues that Ray's processes tokenize before the measurement, which excludes their imports."""
COLUMNS = (
    "preparation",
    "dialogues",
    "seconds",
    "tokens/s",
    "tokens per CPU second",
    "driver's peak GB",
)
TURNS = (1, 2, 3, 3, 4, 4, 5)
"""Exchanges per dialogue, equally likely; UltraChat's dialogues have 3.2 on average."""
WORDS = 850
"""Mean words per dialogue; they give UltraChat's mean of 1,011 tokens."""


def main(out: Path, dialogues: list[int]) -> None:
    """Runs all measurements and writes a table."""
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / "model")
    for count in dialogues:
        write_dialogues(out / f"{count}" / "rows.jsonl", count)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    before: list[float] = []
    ways = [(way, dialogues[0]) for way in WAYS] + [("recipe", count) for count in dialogues]
    for way, count in ways:
        command = [sys.executable, "-m", "benchmarks.data", "--out", str(out), "--measure", way]
        done = subprocess.run(
            [*command, "--dialogues", str(count)], check=True, stdout=subprocess.PIPE, text=True
        )
        result = json.loads(done.stdout.splitlines()[-1])
        rates = [result["tokens"] / result[seconds] for seconds in ("seconds", "cpu_seconds")]
        before = before or rates
        cells = [result["name"], f"{count:,}", f"{result['seconds']:.1f}"]
        cells += [
            f"{rate:,.0f} ({rate / old:.2f} ×)" for rate, old in zip(rates, before, strict=True)
        ]
        if way == "recipe":  # its workers have ended, and their CPU seconds are unknown
            cells[-1] = ""
        cells.append(f"{result['peak']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    (out / "data.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(out: Path, way: str, dialogues: int) -> None:
    """Prints one measurement as JSON."""
    folder = out / f"{dialogues}-{way}"
    subprocess.run(["rm", "-rf", folder], check=True)
    (folder / "scratch").mkdir(parents=True)
    work = Work(
        name="sft",
        folder=folder,
        seed=0,
        inputs={"sft_data": Artifact(out / f"{dialogues}", Manifest(kind="t", key="k", files={}))},
        models={"base": Model("base", VllmSettings(weights=str(out / "model")))},
        files={},
    )
    run = run_recipe if way == "recipe" else WAYS[way]
    seconds, cpu_seconds = run(work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    name = (run.__doc__ or "").splitlines()[0].rstrip(".")
    result = {"name": name, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak}
    print(json.dumps({**result, "tokens": work.counts["tokens"]}), flush=True)


class Clock:
    """Counts wall-clock seconds, and the CPU seconds of this process and its descendants."""

    def __init__(self) -> None:
        self._started = self._read()

    def __call__(self) -> tuple[float, float]:
        now = self._read()
        return now[0] - self._started[0], now[1] - self._started[1]

    @staticmethod
    def _read() -> tuple[float, float]:
        own = psutil.Process()
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return time.perf_counter(), sum(spent.user + spent.system for spent in times)


Seconds = tuple[float, float]


def row_by_row(work: Work) -> Seconds:
    """Row by row in the driver, as before."""
    from datasets import Dataset, Features, Sequence, Value
    from trl.data_utils import pack_dataset

    pin()
    stage, chat = settings(work), load_chat(work.models["base"].weights)
    chat._encoder._encode = chat._encoder._encode_whole
    chat.answers = MethodType(answers_token_by_token, chat)
    clock, kept = Clock(), []
    rows = work.inputs[stage.data].rows()
    for row in rows:
        ids, trained = chat.render(row["messages"])
        for span, answer in zip(chat.answers(ids, trained), answers(row["messages"]), strict=True):
            trained[span[-1]] = answer.get("finish_reason") != "length"
        ids, trained = ids[: stage.max_length], trained[: stage.max_length]
        labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]
        kept.append({"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)})
    features = Features({name: Sequence(Value("int32")) for name in ("input_ids", "labels")})
    data = Dataset.from_list(kept, features=features)
    data = pack_dataset(data.shuffle(seed=0), stage.max_length, "bfd")
    data.save_to_disk(str(work.scratch / "data"))
    work.counts["tokens"] = sum(len(ids) for ids in data["input_ids"])
    return clock()


def answers_token_by_token(chat: ChatFormat, ids: list[int], trained: list[bool]) -> list[range]:
    """`ChatFormat.answers` of earlier versions."""
    spans: list[range] = []
    start = None
    for at, (token, on) in enumerate(zip([*ids, -1], [*trained, False], strict=True)):
        if on and start is None:
            start = at
        if start is not None and (not on or token == chat.stop_token_id):
            spans.append(range(start, at + on))
            start = None
    return spans


def one_process(work: Work) -> Seconds:
    """Block by block in one process on one core."""
    pin()

    def run(task: Any, blocks: list[Any]) -> Iterator[Any]:
        return (preparation.prepare_block(task, block) for block in blocks)

    preparation._run = run
    load_chat(work.models["base"].weights)  # imports, as in `row_by_row`
    return prepare(work)


def one_task(work: Work) -> Seconds:
    """Ray Data with one task at a time."""
    return with_ray(work, cpus=1)


def two_tasks(work: Work) -> Seconds:
    """Ray Data with two tasks at a time."""
    return with_ray(work, cpus=2)


WAYS: dict[str, Callable[[Work], Seconds]] = {
    "before": row_by_row,
    "process": one_process,
    "one": one_task,
    "two": two_tasks,
}


def run_recipe(work: Work) -> Seconds:
    """The sft stage of zephyr-7b-paper up to its first step, including Ray's start."""
    from zephyr_ray.ray_cluster import connect

    clock = Clock()
    connect(cpus=2)
    settings(work).run(work)
    assert work.counts["steps"] == 1
    return clock()


def settings(work: Work) -> Sft:
    """Returns the recipe's sft stage, with a single small step on one CPU."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"]["sft"]
    names = {"model": "base", "data": "sft_data"}
    step = {"epochs": 1e-9, "global_batch": 2, "workers": 1, "gpus_per_worker": 0, "zero": 0}
    fields = {name: value for name, value in recipe.items() if name not in ("kind", "validation")}
    return Sft(**{**fields, **names, **step})


def with_ray(work: Work, cpus: int) -> Seconds:
    from zephyr_ray.ray_cluster import connect

    connect(cpus)
    blocks.FEW_BLOCKS = 0  # Ray's processes run the few blocks of the warm-up too
    rows = work.inputs["sft_data"].folder / "rows.jsonl"
    warm = work.folder / "warm"
    warm.mkdir()
    with rows.open("rb") as file:
        (warm / "rows.jsonl").write_bytes(b"".join(file.readline() for _ in range(WARM_UP)))
    inputs = {"sft_data": Artifact(warm, Manifest(kind="t", key="k", files={}))}
    prepare(Work(**{**vars(work), "folder": warm, "inputs": inputs, "counts": {}}))
    return prepare(work)


def prepare(work: Work) -> Seconds:
    clock = Clock()
    settings(work).prepare(work)
    return clock()


def pin() -> None:
    """Keeps this process on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def write_model(folder: Path) -> None:
    """Writes a Llama of two narrow layers with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve(TOKENIZER))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_dialogues(path: Path, count: int, distinct: int = 20_000) -> None:
    """Writes dialogues with UltraChat's lengths; beyond `distinct`, the texts repeat.

    Words are from the tokenizer's vocabulary, with the frequencies of English (Zipf-Mandelbrot),
    shorter ones more frequent. A comma or a full stop follows every seventh word.
    """
    if path.exists() and sum(1 for _ in path.open("rb")) == count:
        return
    path.parent.mkdir(exist_ok=True)
    pick = np.random.default_rng(0)
    words = vocabulary()
    shares = 1 / (np.arange(len(words)) + 2.7)
    bounds = np.cumsum(shares / shares.sum())
    rows = []
    for _ in range(min(count, distinct)):
        turns = int(pick.choice(TURNS))
        total = min(1750, max(20, int(pick.lognormal(np.log(WORDS) - 0.125, 0.5))))
        messages = []
        for _ in range(turns):
            for role, share in (("user", 0.2), ("assistant", 0.8)):
                ranks = np.searchsorted(bounds, pick.random(max(2, int(total * share / turns))))
                messages.append({"role": role, "content": text([words[rank] for rank in ranks])})
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False)[1:])
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f'{{"id": "{number}", {rows[number % len(rows)]}\n')


def vocabulary() -> list[str]:
    """Returns the alphabetic words of the tokenizer's vocabulary, shortest first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(TOKENIZER))
    texts = (tokenizer.decode([number]) for number in range(len(tokenizer)))
    starts = {word[1:] for word in texts if word[:1] == " " and word[1:].isalpha()}
    return sorted((word for word in starts if word.isascii()), key=lambda word: (len(word), word))


def text(words: list[str]) -> str:
    """Returns a text with punctuation."""
    marks = {6: ",", 13: ".", 69: ".\n\n"}
    words = [word + marks.get(at % 70, marks.get(at % 14, "")) for at, word in enumerate(words)]
    return " ".join(words).replace("\n ", "\n") + "."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dialogues", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--measure", choices=[*WAYS, "recipe"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.out, arguments.measure, arguments.dialogues[0])
    else:
        main(arguments.out, arguments.dialogues)
