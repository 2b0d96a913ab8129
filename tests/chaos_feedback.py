"""Runs configs/feedback-openai.yaml against a faulty provider, and kills and restarts the run;
compares its data with those of an undisturbed run, and the costs of both with the provider's bill.

    PYTHONPATH=tests python tests/chaos_feedback.py --rows 2000
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zephyr_ray.engines.ledger import Ledger, Spent, ledger_folder

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "feedback-openai.yaml"
NAME = "feedback-openai"
STAGES = ("prompts", "completions", "feedback", "pairs")
PRICE = (1.0, 3.0, 0.5)


@contextmanager
def provider_process(faults: float) -> Iterator[str]:
    """Runs a provider in its own process; yields its address."""
    program = str(Path(__file__).with_name("fake_provider.py"))
    command = [sys.executable, program, f"--faults={faults}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip().removesuffix("/v1")
        finally:
            process.kill()


def bill(address: str) -> dict[str, Any]:
    """Returns the provider's counts by model."""
    with urllib.request.urlopen(f"{address}/bill", timeout=120) as response:
        return dict(json.load(response))


def hold_after(address: str, answers: int) -> None:
    """Lets the provider hold requests back after this many answers."""
    request = urllib.request.Request(f"{address}/hold/{answers}", method="POST")
    urllib.request.urlopen(request, timeout=120).close()


@dataclass
class Run:
    """Runs the recipe, possibly several times, with one storage folder."""

    address: str
    storage: Path
    prompts: Path
    program: tuple[str, ...]

    def start(self) -> "subprocess.Popen[bytes]":
        settings = {
            "storage": self.storage,
            "prompts.files": self.prompts,
            "prompts.dataset": "null",
            "prompts.split": "train",
        }
        for model in models():
            settings |= {
                f"models.{model}.base_url": f"{self.address}/v1",
                f"models.{model}.api_key_env": "null",
                f"models.{model}.temperature": 0,
                f"models.{model}.price": str(list(PRICE)),
                f"models.{model}.requests_per_minute": "null",
            }
        command = [sys.executable, *self.program, str(RECIPE)]
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        return subprocess.Popen(command, start_new_session=True)

    def complete(self) -> None:
        assert self.start().wait() == 0

    def kill_after(self, answers: int) -> None:
        """Kills a run once the provider has given this many answers, after which it gives none."""
        hold_after(self.address, answers)
        process = self.start()
        while sum(model["answers"] for model in bill(self.address).values()) < answers:
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        hold_after(self.address, sys.maxsize)

    def rows(self, stage: str) -> bytes:
        return (self.storage / NAME / "data" / stage / "rows.jsonl").read_bytes()

    def logged(self) -> Counter[tuple[str, str]]:
        """Returns the number of logged answers per request, by log folder and request key."""
        return Counter(
            (path.parent.name, json.loads(line)["key"])
            for path in self.storage.glob("answers/*/*.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
            if line
        )

    def spent(self) -> dict[str, Spent]:
        return Ledger(ledger_folder(self.storage, NAME)).spent()


def write_prompts(path: Path, rows: int) -> None:
    lines = (
        {
            "prompt_id": f"q{number:05d}",
            "prompt": f"What should one know about the number {number}?",
        }
        for number in range(rows)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def compare(
    folder: Path,
    rows: int,
    faults: float = 0.1,
    kills: tuple[float, ...] = (0.15, 0.6),
    program: tuple[str, ...] = ("-m", "zephyr_ray.pipeline"),
) -> list[str]:
    """Runs the recipe without faults, then with faults and kills, each after a share of all
    answers. Returns the costs, line by line; raises AssertionError if data or costs differ."""
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, rows)
    with provider_process(faults=0) as address:
        plain = Run(address, folder / "plain", prompts, program)
        plain.complete()
        bills = bill(address)
    total = sum(model["answers"] for model in bills.values())
    lines = ["without faults or kills", *check_costs(plain, bills)]
    for spent in plain.spent().values():
        assert spent.unknown_requests == 0
    with provider_process(faults) as address:
        chaos = Run(address, folder / "chaos", prompts, program)
        for share in kills:
            chaos.kill_after(int(share * total))
        chaos.complete()
        bills = bill(address)
    lines += ["with faults and kills", *check_costs(chaos, bills)]
    for stage in STAGES:
        assert chaos.rows(stage) == plain.rows(stage), f"{stage} differs"
    # A request that was sent again although it had been answered would have two entries.
    logged = chaos.logged()
    assert len(logged) == total and set(logged.values()) == {1}
    return lines


def check_costs(run: Run, bills: dict[str, Any]) -> list[str]:
    """Compares the costs in the ledger with the provider's bill."""
    names = {settings["model"]: name for name, settings in models().items()}
    assert bills.keys() == names.keys()
    lines = []
    for model, counted in sorted(bills.items()):
        spent = run.spent()[names[model]]
        # For requests in flight when a process was killed, the ledger knows only an upper bound.
        missing = counted["answers"] - spent.requests
        assert 0 <= missing <= spent.repeated_requests, f"{model}: {missing} requests are missing"
        assert counted["repeated"] <= spent.repeated_requests
        lost = counted["dollars"] + counted["lost_dollars"] - spent.dollars
        assert -1e-9 <= lost <= spent.unknown_dollars + 1e-9
        if not missing:
            assert abs(counted["dollars"] - spent.dollars) < 1e-9
        lines.append(
            f"{model}: {counted['requests']:,} requests, {sum(counted['faults'].values()):,} "
            f"faults, {counted['answers']:,} answers ({counted['repeated']} repeated by kills), "
            f"${counted['dollars']:.6f}, and ${counted['lost_dollars']:.6f} for replies that broke"
        )
        lines.append(
            f"  ledger: {spent.requests:,} answers, ${spent.dollars:.6f}, and at most "
            f"${spent.unknown_dollars:.6f} for {spent.unknown_requests} replies that broke or were "
            "in flight at a kill"
        )
    return lines


def models() -> dict[str, Any]:
    """Returns the models of the recipe."""
    return dict(yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["models"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--faults", type=float, default=0.1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for line in compare(Path(folder), options.rows, options.faults):
            print(line)


if __name__ == "__main__":
    main()
