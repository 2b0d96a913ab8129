"""Tests the content keys of the shipped recipes: a changed key makes users repeat the work."""

import json
from pathlib import Path

import pytest

from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.recipe import load
from zephyr_ray.store import Store

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
GOLDEN = Path(__file__).parent / "golden" / "keys.json"


def keys(name: str, storage: Path) -> dict[str, str]:
    recipe = load(ROOT / "configs" / f"{name}.yaml", KINDS, [f"storage={storage}"])
    return {step.name: step.key for step in make_plan(recipe, Store(recipe.storage))}


@pytest.mark.parametrize("name", RECIPES)
def test_keys_are_golden(name: str, tmp_path: Path) -> None:
    """To change a key, raise the version of the kind whose meaning changes, and write the new keys:
    python tests/test_golden_keys.py"""
    assert keys(name, tmp_path) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        golden = {name: keys(name, Path(folder)) for name in RECIPES}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
