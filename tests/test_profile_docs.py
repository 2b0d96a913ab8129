"""Tests the profiles of docs/kubernetes-client.md."""

import re
from pathlib import Path

import pytest
from chart_tools import ROOT

from zephyr_ray import recipe as recipes
from zephyr_ray.cluster.limits import pods_of
from zephyr_ray.cluster.profile import Profile, load, quantity
from zephyr_ray.pipeline import KINDS
from zephyr_ray.preflight import check_processors


def profile(number: int, folder: Path) -> Profile:
    text = (ROOT / "docs" / "kubernetes-client.md").read_text()
    path = folder / "zephyr-cluster.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[number])
    return load(path)


@pytest.mark.parametrize("number", [0, 1])
def test_the_profiles_are_valid(number: int, tmp_path: Path) -> None:
    assert profile(number, tmp_path).storage.claim


def test_kinds_profile_fits_beside_mlflow_and_runs_the_quickstart(tmp_path: Path) -> None:
    """The node has 6 CPUs, 20 GiB. MLflow requests 250m and 2Gi, the operator 100m and 512Mi, and
    kind's pods 950m and 290Mi; 17 GiB remain."""
    small = profile(1, tmp_path)
    for kind, available in {"cpu": 6 - 0.25 - 0.1 - 0.95, "memory": 17 * 2**30}.items():
        used = sum(pods.count * quantity(pods.amounts[kind]) for pods in pods_of(small))
        assert used <= available
    recipe = recipes.load(ROOT / "configs" / "quickstart.yaml", KINDS)
    check_processors(recipe, recipe.stages, small.cpus, small.gpus, "the profile")
