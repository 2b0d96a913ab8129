"""Runs small training stages."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from zephyr_ray.chat import ChatFormat
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import with_facts
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, write_rows
from zephyr_ray.train.data import Data
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft
from zephyr_ray.train.stage import WorkerStage

WORDS = ["quick", "brown", "foxes", "jump", "over", "lazy", "dogs", "while", "bright", "stars"]
SFT = {
    "epochs": 2,
    "global_batch": 4,
    "learning_rate": 3e-3,
    "max_length": 128,
    "packing": False,
    "precision": "fp32",
    "checkpoint_every": 5,
    "seed": 1,
}


def dialogues(count: int) -> list[dict[str, Any]]:
    pick = random.Random(0)
    text = lambda most: " ".join(pick.choices(WORDS, k=pick.randint(2, most)))  # noqa: E731
    return [
        {
            "id": str(number),
            "messages": [
                {"role": "user", "content": text(8)},
                {"role": "assistant", "content": text(16)},
            ],
        }
        for number in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    rows = []
    for good, bad in zip(dialogues(count), reversed(dialogues(count)), strict=True):
        ask = good["messages"][:1]
        rows.append(
            {
                "id": good["id"],
                "prompt": ask[0]["content"],
                "chosen": good["messages"],
                "rejected": [*ask, *bad["messages"][1:]],
                "score_chosen": 1.0,
                "score_rejected": 0.0,
            }
        )
    return rows


def work_for(folder: Path, model: Path, rows: list[dict[str, Any]]) -> Work:
    data, made = folder / "data", folder / "made"
    for path in (data, made / "scratch"):
        path.mkdir(parents=True, exist_ok=True)
    write_rows(data, rows)
    return Work(
        name="train",
        folder=made,
        seed=0,
        inputs={"data": Artifact(data, Manifest(kind="text", key="data", files={}))},
        models={"base": Model("base", VllmSettings(weights=str(model)))},
        files={},
    )


def prepare(stage: WorkerStage, work: Work, rows: list[dict[str, Any]]) -> Data:
    """Prepares the rows, and replaces those of an earlier call."""
    shutil.rmtree(work.scratch / "data", ignore_errors=True)
    # JSON's ASCII escapes, because UTF-8 cannot encode half a surrogate pair.
    lines = [json.dumps(row) + "\n" for row in rows]
    (work.inputs["data"].folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return stage.prepare(work)


def tokens(stage: WorkerStage, chat: ChatFormat, row: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the tokens of one row."""
    return stage.tokenize(chat, with_facts(row), Counter())


def sft(folder: Path, model: Path, **settings: Any) -> Work:
    work = work_for(folder, model, dialogues(48))
    Sft(model="base", data="data", **{**SFT, **settings}).run(work)
    return work


def dpo(folder: Path, model: Path, **settings: Any) -> Work:
    work = work_for(folder, model, pairs(12))
    Dpo(model="base", data="data", **settings).run(work)
    return work
