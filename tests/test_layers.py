"""Tests what linters cannot: only owners branch on a kind, an engine or an artifact type."""

import ast
import tomllib
from pathlib import Path

from zephyr_ray.pipeline import STAGES

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"kind", "engine", "makes"}
OWNERS = {
    "zephyr_ray/references.py",  # checks that a stage makes what another one reads
    "zephyr_ray/plan.py",  # reports that a stage had another kind
}
OTHER_MEANINGS = {
    "zephyr_ray/cluster/kube.py",  # kinds of watch events
    "zephyr_ray/cluster/watch.py",
    "zephyr_ray/cluster/checks.py",  # kinds of Kubernetes resources
    "zephyr_ray/models/gguf_conversion.py",  # kinds of tokens
    "zephyr_ray/cluster/profile_checks.py",  # kinds of GPUs and storage classes
    "zephyr_ray/models/constraints.py",  # kinds of constraints
    "zephyr_ray/engines/demonstrations.py",
}


def is_named(node: ast.expr) -> bool:
    """Returns whether an operand is `kind`, `x.kind`, `x["kind"]`, `x.get("kind")` or
    `getattr(x, "kind")`."""
    if isinstance(node, ast.Call):
        return any(isinstance(a, ast.Constant) and a.value in NAMES for a in node.args[:2])
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return node.slice.value in NAMES
    return getattr(node, "attr", None) in NAMES or getattr(node, "id", None) in NAMES


def branches(source: str) -> list[int]:
    """Returns the lines that compare one of NAMES or match on it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        operands += [node.subject] if isinstance(node, ast.Match) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # x.kind.startswith("a")
            operands += [node.func.value] if node.func.attr.endswith("with") else []
        lines += [node.lineno for operand in operands if is_named(operand)]
    return lines


def test_a_branch_is_detected() -> None:
    lines = ['s.kind == "sft"', 'engine in ("a", "b")', 'm["makes"] != x', "kinds == 1"]
    assert [branches(line) for line in lines] == [[1], [1], [1], []]
    lines = ['m.get("engine") == x', 'getattr(s, "kind", "") == x', 's.kind.startswith("s")']
    assert [branches(line) for line in lines] == [[1], [1], [1]]


def test_only_owners_branch_on_kind_engine_or_makes() -> None:
    violations = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "zephyr_ray").rglob("*.py")
        if str(path.relative_to(ROOT)) not in OWNERS | OTHER_MEANINGS
        for line in branches(path.read_text(encoding="utf-8"))
    }
    assert violations == set()


def test_every_kind_of_stage_is_independent_by_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    modules = {stage.partition(":")[0] for stage in STAGES}
    [kinds] = [c for c in contracts["contracts"] if c["type"] == "independence"]
    assert set(kinds["modules"]) - {"zephyr_ray.text.*"} == {
        module for module in modules if not module.startswith("zephyr_ray.text.")
    }
