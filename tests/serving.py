"""Starts a real `zephyr serve` of a tiny model for tests over HTTP."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from ports import free_port

from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.engines.vllm import VllmSettings

KEY, OTHER = "first-of-the-keys", "second-of-the-keys"
READY_SECONDS = 600
CONTEXT = 256


@dataclass
class Service:
    address: str
    run: Path
    process: subprocess.Popen[bytes]
    log: Path
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120))

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0)

    def post(self, path: str, body: Any, key: str | None = KEY, **headers: str) -> httpx.Response:
        headers = {"Content-Type": "application/json", **headers}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(f"{self.address}{path}", content=content, headers=headers)


def a_run(folder: Path, model: Path) -> Path:
    """Writes the folder of a finished run with a trained model and a judged comparison."""
    store, run = folder / "store", folder / "tiny"
    (run / "models").mkdir(parents=True)
    (run / "data").mkdir()
    base = VllmSettings(weights=str(model)).model_dump()
    # Earlier versions wrote the settings of all engines in every model.
    judge = RulesSettings().model_dump() | {"weights": None, "temperature": 0.7, "model": None}
    for name, manifest in (
        ("dpo-1", {"kind": "dpo", "created": "2026-01-01", "models": {"base": base}}),
        (
            "pairwise-1",
            {
                "kind": "pairwise",
                "settings": {"judge": "judge", "control": None},
                "models": {"judge": judge},
            },
        ),
    ):
        (store / name).mkdir(parents=True)
        complete = {"key": name, "files": {}, **manifest}
        (store / name / "manifest.json").write_text(json.dumps(complete))
    (store / "pairwise-1" / "result.json").write_text("{}")
    shutil.copytree(model, store / "dpo-1" / "model")
    (run / "models" / "dpo").symlink_to("../../store/dpo-1/model")
    (run / "data" / "winrate").symlink_to("../../store/pairwise-1")
    return run


def adapter_on(model: Path, folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


@contextmanager
def served(tiny_model: Path, folder: Path) -> Iterator[Service]:
    """Serves the model `dpo`, the adapter `slim` on it, and a rules judge, with two keys."""
    run, port = a_run(folder, tiny_model), free_port()
    adapter = adapter_on(tiny_model, folder / "adapter")
    log = folder / "log"
    command = [
        *(sys.executable, "-m", "zephyr_ray.cli", "serve", str(run), "--port", str(port)),
        *("--models", "dpo", "--adapter", f"slim={adapter}", "--context", str(CONTEXT)),
        *("--max-tokens", "200", "--requests-per-minute", "100000"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["RAY_metrics_report_interval_ms"] = "500"
    environment["ZEPHYR_API_KEYS"] = f"{KEY}, {OTHER}"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    service = Service(f"http://127.0.0.1:{port}", run, process, log)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while "chat " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=300)  # replicas end their requests first
        finally:
            process.kill()
