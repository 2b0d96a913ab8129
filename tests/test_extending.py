"""Tests that the toys of docs/07, each one new file and one line, work in a copy of the package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zephyr_ray import engines, judges, pipeline

ROOT = Path(__file__).resolve().parents[1]
TOYS = sorted((ROOT / "tests" / "toys").glob("*.diff"))
RECIPE = """\
name: toy
models:
  echo: {engine: echo}
stages:
  prompts: {kind: prompts, seeds: seeds.jsonl, constrained: 0}
  short: {kind: short_prompts, prompts: prompts, words: 4}
  answers: {kind: completions, models: [echo], prompts: short}
"""
PROGRAM = """
import asyncio
from zephyr_ray.engines import ENGINES
from zephyr_ray.engines.model import Model
from zephyr_ray.judges import FORMS
from zephyr_ray.messages import user
from zephyr_ray.serve.requests import judge_request, parse

settings = ENGINES["echo"].model_validate({"engine": "echo"})
ask = settings.start(seed=0).ask_for(Model("echo", settings), {})
print(asyncio.run(ask([user("Hello")], max_tokens=8)).text)
print(asyncio.run(ask.judge("safety", {}, [{"text": "yes"}])))
body = b'{"requests": [{"prompt": "p", "completion": {"text": "t"}}]}'
print(parse(judge_request(FORMS["safety"].fields), body).requests[0].completion.text)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the package with all three toys in it."""
    folder = tmp_path_factory.mktemp("checkout")
    # Other tests write compiled files meanwhile.
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "zephyr_ray", folder / "zephyr_ray", ignore=ignored)
    for toy in TOYS:
        subprocess.run(["git", "apply", str(toy)], cwd=folder, check=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    tasks = ("Name a big tree.", "Name a big tree and a small one.")
    seeds = "".join(json.dumps({"instruction": task}) + "\n" for task in tasks)
    (folder / "seeds.jsonl").write_text(seeds)
    return folder


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("names", "registered"),
    [
        (pipeline.STAGES, pipeline.KINDS),
        (engines._NAMES, engines.ENGINES),
        (judges._NAMES, judges.FORMS),
    ],
    ids=["stages", "engines", "forms"],
)
def test_every_registered_entry_has_its_own_name(
    names: tuple[str, ...], registered: dict[str, object]
) -> None:
    assert len(registered) == len(names)
    assert all(isinstance(name, str) for name in registered)


@pytest.mark.parametrize("toy", TOYS, ids=lambda path: path.stem)
def test_a_toy_is_one_new_file_and_one_line(toy: Path) -> None:
    new, changed = re.split(r"^(?=diff --git)", toy.read_text(), flags=re.MULTILINE)[1:]
    if "new file mode" in changed:
        new, changed = changed, new
    assert "new file mode" in new and "new file mode" not in changed
    lines = [line for line in changed.splitlines() if re.match(r"[+-](?![+-])", line)]
    assert len(lines) == 1 and lines[0].startswith("+")


def test_the_docs_show_the_toys() -> None:
    page = (ROOT / "docs" / "07-extending.md").read_text(encoding="utf-8")
    assert len(TOYS) == 3
    for toy in TOYS:
        assert f"```diff\n{toy.read_text(encoding='utf-8')}```" in page


def test_a_toy_kind_runs_in_a_recipe(checkout: Path) -> None:
    run(checkout, "-m", "zephyr_ray.pipeline", "recipe.yaml", "--until", "short")
    rows = (checkout / "runs" / "toy" / "data" / "short" / "rows.jsonl").read_text()
    assert [json.loads(row)["prompt"] for row in rows.splitlines()] == ["Name a big tree."]
    plan = run(checkout, "-m", "zephyr_ray.pipeline", "recipe.yaml", "--plan")
    assert re.search(r"answers +completions +to do +≤ 1 ", plan)


def test_a_toy_engine_answers_and_judges_by_a_toy_form(checkout: Path) -> None:
    judgement = "{'safe': None, 'asked_again': 1}"
    assert run(checkout, "-c", PROGRAM).splitlines() == ["Hello", judgement, "t"]
