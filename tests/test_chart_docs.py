"""Tests commands in the docs: runs those of helm; those of kubectl must name what helm creates."""

import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from chart_tools import ROOT
from helm_api import HelmApi

PAGES = sorted(
    [*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("helm/zephyr/*.md"),
     *ROOT.glob("helm/zephyr/values-*.yaml")]
)  # fmt: skip
PLACEHOLDERS = {
    "REGISTRY": "registry.example",
    "CLASS": "nfs",
    "TAG": "v2",
    "DIGEST": f"sha256:{'a' * 64}",
    "REVISION": "1",
    "…": "",
}
MADE_BY_THE_OPERATOR = {"zephyr-head-svc", "zephyr-serve-serve-svc"}
FILES = {"mine.yaml": "name: mine\nstages: {}\n", "seeds/train.jsonl": "{}\n"}


def commands(page: Path, program: str) -> list[str]:
    """Returns the page's command lines that start with `program`, in order."""
    text = re.sub(r" *\\\n *#? *", " ", page.read_text())
    return re.findall(rf"^(?:#? +|`)({program} [^`\n]+)", text, re.MULTILINE)


def ours(command: str) -> bool:
    return bool(re.match("helm (install|upgrade|rollback|uninstall) zephyr\\b", command))


HELM = {page.name: [c for c in commands(page, "helm") if ours(c)] for page in PAGES}


def test_the_pages_have_commands() -> None:
    assert len(HELM["kubernetes.md"]) >= 9 and HELM["kubernetes-platform.md"]
    assert all(HELM[f"values-{preset}.yaml"] for preset in ("kind", "gpu-8", "multinode"))
    verbs = {command.split()[1] for command in HELM["kubernetes.md"]}
    assert verbs == {"install", "upgrade", "rollback", "uninstall"}


@pytest.mark.parametrize("page", [name for name, lines in HELM.items() if lines])
def test_helms_commands_work_one_after_the_other(page: str, tmp_path: Path) -> None:
    """Each `helm install` gets an empty cluster; a page without one continues kubernetes.md."""
    (tmp_path / "helm").symlink_to(ROOT / "helm")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    walk = HELM[page]
    if " install " not in walk[0]:
        walk = HELM["kubernetes.md"][:2] + walk
    api = HelmApi()
    for command in walk:
        for placeholder, value in PLACEHOLDERS.items():
            command = re.sub(rf"\b{placeholder}\b", value, command)
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "install":
            api.close()
            api = HelmApi()
        more = ["--disable-openapi-validation"] if words[0] in ("install", "upgrade") else []
        done = api.helm(*words, *more, home=tmp_path, folder=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    api.close()


def test_kubectls_commands_name_what_exists(tmp_path: Path) -> None:
    api = HelmApi()
    names: set[str] = set(MADE_BY_THE_OPERATOR)
    install, upgrade = HELM["kubernetes.md"][:2]
    for command in (install, f"{upgrade} --set cluster.enabled=true"):
        words = shlex.split(command)[1:]
        done = api.helm(*words, "--disable-openapi-validation", home=tmp_path)
        assert done.returncode == 0, done.stderr
        names |= {document["metadata"]["name"] for document in api.objects.values()}
    api.close()
    kinds = "rayjob|rayservice|raycluster|svc|service|deployment|pvc|pod"
    named = [
        name
        for page in PAGES
        for command in commands(page, "kubectl")
        for name in re.findall(rf"\b(?:{kinds})[/ ](zephyr[a-z0-9-]*)", command)
    ]
    assert len(named) >= 6 and set(named) <= names


def test_a_full_removal_waits_for_the_clean_up_of_redis() -> None:
    """The operator's clean-up pod needs the ServiceAccount and the claims."""
    page = ROOT / "docs" / "kubernetes.md"
    removal = commands(page, "(?:helm|kubectl)")
    at = next(i for i, command in enumerate(removal) if command.startswith("helm uninstall zephyr"))
    selector = "--selector app.kubernetes.io/instance=zephyr"
    assert removal[at + 1].startswith(f"kubectl wait --for=delete raycluster {selector}")
    assert (
        removal[at + 2] == f"kubectl delete pvc,serviceaccount,configmap,networkpolicy {selector}"
    )


def test_mlflows_database_is_backed_up_and_restored(tmp_path: Path) -> None:
    page = ROOT / "docs" / "kubernetes-platform.md"
    backup, restore = (shlex.split(c)[-1] for c in commands(page, "kubectl exec"))
    database = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    database.execute("create table runs (name text)")
    database.execute("insert into runs values ('old')")
    for program, change in ((backup, "update runs set name = 'new'"), (restore, "select 1")):
        local = program.replace("/mlflow/", f"{tmp_path}/")
        subprocess.run([sys.executable, "-c", local], check=True)
        database.execute(change)
    assert database.execute("select name from runs").fetchall() == [("old",)]
