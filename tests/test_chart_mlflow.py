"""Tests MLflow in the chart: its image, service and ingress, and the schema of its database."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chart_tools import CLUSTER, Document, kind, render, template, values_errors
from pod_flags import Node, expanded
from pod_flags import environment as pod_environment

CLIENTS = "networkPolicy.mlflowClients[0].podSelector.matchLabels.app=proxy"
OLDER = "75868b020152"
"""Revision of a database schema older than the one that MLflow 3.17.2 needs."""
INGRESS = (*CLUSTER, CLIENTS, "mlflow.ingress.enabled=true", "mlflow.ingress.host=runs.example")


def pod(*sets: str) -> Document:
    [deployment] = kind(render(sets=(*CLUSTER, *sets)), "Deployment")
    return dict(deployment["spec"]["template"]["spec"])


def test_mlflow_may_have_an_image_of_its_own() -> None:
    own = pod("mlflow.image=registry.example/mlflow:3.17.2", "image.tag=2.0")
    images = [c["image"] for c in own["initContainers"] + own["containers"]]
    assert images == ["registry.example/mlflow:3.17.2"] * 2
    assert pod("image.tag=2.0")["containers"][0]["image"] == "zephyr-ray:2.0"


def test_the_service_has_its_type_and_annotations() -> None:
    sets = ("mlflow.service.type=LoadBalancer", "mlflow.service.annotations.internal=yes")
    [service] = kind(render(sets=(*CLUSTER, CLIENTS, *sets)), "Service")
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["metadata"]["annotations"] == {"internal": "yes"}


def test_the_ingress_leads_to_mlflow() -> None:
    tls = ("mlflow.ingress.tls.enabled=true", "mlflow.ingress.tls.secretName=runs-tls")
    [ingress] = kind(render(sets=(*INGRESS, *tls, "mlflow.ingress.className=nginx")), "Ingress")
    [service] = kind(render(sets=INGRESS), "Service")
    [rule] = ingress["spec"]["rules"]
    [path] = rule["http"]["paths"]
    backend = path["backend"]["service"]
    assert rule["host"] == "runs.example" and ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == [{"hosts": ["runs.example"], "secretName": "runs-tls"}]
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"]["number"] in [port["port"] for port in service["spec"]["ports"]]


@pytest.mark.parametrize("sets", [INGRESS, (*CLUSTER, "mlflow.allowedHosts={runs.example}")])
def test_browsers_may_use_mlflow_under_its_external_host_name(sets: tuple[str, ...]) -> None:
    """Uses MLflow's own Origin check; browsers send that header with every run search."""
    from mlflow.server.security_utils import should_block_cors_request as blocks

    [deployment] = kind(render(sets=sets), "Deployment")
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    options = dict(a.removeprefix("--").split("=", 1) for a in arguments)
    assert "runs.example" in options["allowed-hosts"].split(",")
    origins = options["cors-allowed-origins"].split(",")
    assert not blocks("https://runs.example", "POST", origins)
    assert blocks("https://evil.example", "POST", origins)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (INGRESS[:2] + ("mlflow.ingress.enabled=true",), "set mlflow.ingress.host"),
        ((*INGRESS, "mlflow.ingress.tls.enabled=true"), "set mlflow.ingress.tls.secretName"),
        ((*CLUSTER, *INGRESS[2:]), "the clients' namespace to networkPolicy.mlflowClients"),
        (
            (*CLUSTER, "mlflow.service.type=NodePort"),
            "mlflow.service.type NodePort is blocked by the network policy",
        ),
        (
            (*INGRESS, "mlflow.enabled=false"),
            "mlflow.ingress.enabled needs MLflow; set mlflow.enabled=true",
        ),
    ],
)
def test_impossible_access_fails_with_one_line(sets: tuple[str, ...], message: str) -> None:
    result = template(sets=sets)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert message in line


@pytest.mark.parametrize(
    "values",
    [
        {"service": {"type": "ExternalName"}},
        {"service": {"annotation": {}}},
        {"ingress": {"hosts": ["a"]}},
        {"database": {"migration": True}},
        {"livenessProbe": {"exec": {"command": ["true"]}}},
        {"image": "a b"},
    ],
    ids=str,
)
def test_the_schema_rejects_invalid_values(values: dict[str, Any]) -> None:
    assert values_errors({"mlflow": values})


# ------------------------------------------------------------------ the database's schema


def init_container(database: Path, migrate: bool) -> tuple[list[str], dict[str, str]]:
    """Returns the init container's command line and environment, for this database."""
    [init] = pod(f"mlflow.database.migrate={str(migrate).lower()}")["initContainers"]
    address = {"name": "MLFLOW_BACKEND_STORE_URI", "value": f"sqlite:///{database}"}
    others = [v for v in init["env"] if v["name"] != address["name"]]
    init, node = {**init, "env": [*others, address]}, Node(database.parent, {}, {})
    words = [word for key in ("command", "args") for word in expanded(init, key, node)]
    return words, pod_environment(init, node)


def check_database(database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the init container's database check; returns its error line, or an empty string."""
    words, environment = init_container(database, migrate=False)
    assert words[:2] == ["python", "-c"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        exec(words[2], {})
    except SystemExit as end:
        return str(end.code or "")
    return ""


def create_database(database: Path, revision: str) -> None:
    """Creates a database with an older schema, as an older MLflow would leave it."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    Base.metadata.create_all(create_engine(f"sqlite:///{database}"))
    command.upgrade(_get_alembic_config(f"sqlite:///{database}"), revision)


def revision_of(database: Path) -> str:
    [[number]] = sqlite3.connect(database).execute("select version_num from alembic_version")
    return str(number)


def test_an_older_database_is_refused_until_its_migration_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    database, newest = tmp_path / "mlflow.db", _get_latest_schema_revision()
    create_database(database, OLDER)
    line = check_database(database, monkeypatch)
    assert line.startswith(f"the database has schema {OLDER}, MLflow ") and "\n" not in line
    assert line.endswith(f"needs {newest}: back it up, then set mlflow.database.migrate")
    assert revision_of(database) == OLDER

    words, environment = init_container(database, migrate=True)
    words[0] = str(Path(sys.executable).parent / words[0])
    result = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert revision_of(database) == newest and check_database(database, monkeypatch) == ""


def test_a_newer_database_asks_for_the_newer_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens after an image rollback."""
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("create table alembic_version (version_num text)")
        connection.execute("insert into alembic_version values ('feedc0ffee00')")
    line = check_database(tmp_path / "mlflow.db", monkeypatch)
    assert "has schema feedc0ffee00" in line and "a newer MLflow migrated it" in line


def test_an_empty_database_is_left_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_database(tmp_path / "mlflow.db", monkeypatch) == ""


def test_kubectl_describe_shows_a_refusal() -> None:
    [init] = pod()["initContainers"]
    assert init["terminationMessagePolicy"] == "FallbackToLogsOnError"
