"""Tests kubeconfigs that cannot be used: one line with the cause, exit 2, never a secret."""

import base64
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_lab import error
from kube_api import TOKEN, Api
from kubernetes.client import Configuration

from zephyr_ray import cli
from zephyr_ray.cluster.kubeconfig import configure

CANARY = "canary/Pa55word"
"""Occurs in every kubeconfig below, and must occur in no output."""
PLUGIN = {"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never"}
PLUGIN |= {"env": [{"name": "CLIENT_SECRET", "value": CANARY}], "args": ["--password", CANARY]}
OTHER = "0therCanary"
"""A secret that is in no user of the kubeconfig, so that only its form (user:…@) reveals it."""
NOT_PEM = base64.b64encode(CANARY.encode()).decode()
NO_SERVER = "https://127.0.0.1:9"


def shell(text: str) -> dict[str, Any]:
    arguments = ["-c", text, "--password", CANARY]
    return {"exec": PLUGIN | {"command": sys.executable, "args": arguments}}


USERS: dict[str, tuple[dict[str, Any], str]] = {
    "token of two lines": ({"token": f"a\n{CANARY}"}, "contains a line break"),
    "token with a return": ({"token": f"{CANARY}\rb"}, "contains a line break"),
    "token with a bell": ({"token": f"{CANARY}\ab"}, "contains a line break or another character"),
    "token with an ellipsis": ({"token": f"{CANARY}…"}, "no HTTP header can hold"),
    "token that is a number": ({"token": 7, "password": CANARY}, "401|credentials"),
    "token that is a list": ({"token": [CANARY]}, "credentials|configured"),
    "missing token file": (
        {"tokenFile": "/none", "password": CANARY},
        "kubeconfig: the tokenFile of the context's user is not the path of a file; correct it, or "
        "remove it and give the content itself in token$",
    ),
    "token in place of its file": ({"tokenFile": CANARY}, "the tokenFile of the context's user is"),
    "token of two lines in place of its file": (
        {"tokenFile": f"{CANARY}\nb"},
        "the tokenFile of the context's user is not the path",
    ),
    "token with a null in place of its file": ({"tokenFile": f"{CANARY}\0"}, "is not the path of"),
    "key in place of its file": (
        {"client-key": f"-----BEGIN EC PRIVATE KEY-----\n{CANARY}" + "x" * 5000},
        "the client-key of the context's user is not .* itself in client-key-data$",
    ),
    "missing plugin": (
        {"exec": PLUGIN | {"command": "no-such-plugin"}},
        r"exec plugin failed \(.*No such file or directory: 'no-such-plugin'\); install",
    ),
    "plugin without rights": ({"exec": PLUGIN | {"command": "/etc"}}, "failed .*Permission denied"),
    "plugin without a command": ({"exec": PLUGIN}, "plugin failed .*command"),
    "failing plugin": (
        shell(f"import sys; sys.exit('log in first: {CANARY}')"),
        r"process returned 1. log in first: \*\*\*\); install or correct it, or log in",
    ),
    "plugin that prints no JSON": (shell(f"print('{CANARY}')"), "failed to decode process output"),
    "plugin without a token": (
        shell(
            'print(\'{"apiVersion": "client.authentication.k8s.io/v1", '
            f'"kind": "ExecCredential", "status": {{"x": "{CANARY}"}}}}\')'
        ),
        "missing token or clientCertificateData",
    ),
    "provider without a token": (
        {"auth-provider": {"name": "oidc", "config": {"client-secret": CANARY}}},
        "Expected key id-token",
    ),
    "certificate that is not a certificate": (
        {"client-certificate-data": NOT_PEM, "client-key-data": NOT_PEM},
        "client-certificate and client-key cannot be used",
    ),
    "password that is not Latin-1": ({"username": "me", "password": f"{CANARY}…"}, "latin-1"),
}


@pytest.mark.parametrize("case", USERS)
def test_credentials_that_cannot_be_used(
    api: Api, here: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    user, cause = USERS[case]
    if "certificate" in case:
        api.address = NO_SERVER
    (here / "kubeconfig").write_text(api.kubeconfig(user))
    check(error(capsys, "status"), cause)


def edited(**changes: Any) -> Callable[[dict[str, Any]], str]:
    """Returns a function that changes the cluster of a kubeconfig."""

    def edit(config: dict[str, Any]) -> str:
        config["clusters"][0]["cluster"] |= changes
        return json.dumps(config)

    return edit


FILES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "proxy without scheme": (
        edited(**{"proxy-url": f"me:{OTHER}@proxy:3128"}),
        "the proxy to the cluster, .*, has no scheme; write http://",
    ),
    "proxy with a slash": (
        edited(**{"proxy-url": f"me:{OTHER}/{OTHER}@proxy:3128"}),
        "the proxy to the cluster, proxy:3128, has no scheme; write http://proxy:3128$",
    ),
    "proxy with a port as password": (
        edited(**{"proxy-url": f"me:12/{OTHER}@proxy:3128"}),
        "cluster, proxy:3128, has",
    ),
    "proxy with a quote": (
        edited(**{"proxy-url": f"socks9://me:12/'{OTHER}@proxy"}),
        "cluster, socks9://proxy, is invalid",
    ),
    "proxy with a strange scheme": (
        edited(**{"proxy-url": f"me:{OTHER}://x@proxy"}),
        "cluster, proxy, is invalid",
    ),
    "proxy that is a list": (
        edited(**{"proxy-url": ["a"]}),
        "the proxy to the cluster is not text",
    ),
    "server with a line break": (
        edited(server="https://127.0.0.1:x\n"),
        "127.0.0.1:x , is invalid",
    ),
    "proxy of another kind": (
        edited(**{"proxy-url": f"ftp://me:{OTHER}@proxy"}),
        "the proxy to the cluster, ftp://.*proxy, is invalid",
    ),
    "server without scheme": (edited(server="127.0.0.1:6443"), "server, 127.0.0.1:6443, has no"),
    "server with a password": (
        edited(server=f"http://me:{OTHER}@127.0.0.1:x"),
        "server, http://127.0.0.1:x, is invalid",
    ),
    "no server": (edited(server=""), "server, , has no scheme"),
    "authority that is not base64": (
        edited(server=NO_SERVER, **{"certificate-authority-data": f"{CANARY}!"}),
        "certificate-authority-data is not base64; encode the file, or give its path in",
    ),
    "authority that is not a certificate": (
        edited(server=NO_SERVER, **{"certificate-authority-data": NOT_PEM}),
        "the kubeconfig's certificate-authority cannot be used",
    ),
    "missing authority": (
        edited(server=NO_SERVER, **{"certificate-authority": "/no/ca.pem"}),
        "File does not exist: /no/ca.pem",
    ),
    "no YAML": (lambda config: f"users: [{{token: *{CANARY.replace('/', '')}}}]", "not valid YAML"),
    "no YAML in line 2": (lambda config: f"a: b\n c: {CANARY}", "kubeconfig line 2 is not valid"),
    "a list": (lambda config: json.dumps([CANARY]), "is not a mapping"),
    "no context": (
        lambda config: json.dumps(config | {"current-context": ""}),
        "no current-context; set it to lab",
    ),
    "missing context": (
        lambda config: json.dumps(config | {"current-context": "away"}),
        "no context 'away'; use lab",
    ),
    "missing cluster": (
        lambda config: json.dumps(config | {"clusters": []}),
        "name here in .*clus",
    ),
    "users that are a text": (lambda config: json.dumps(config | {"users": CANARY}), "configured"),
    "contexts without names": (
        lambda config: json.dumps(config | {"contexts": [{"token": CANARY}]}),
        "no Kubernetes cluster is configured",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_used(
    api: Api, here: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    edit, cause = FILES[case]
    key = base64.b64encode(CANARY.encode()).decode()
    config = json.loads(api.kubeconfig({"token": CANARY, "client-key-data": key}))
    (here / "kubeconfig").write_text(edit(config))
    check(error(capsys, "status"), cause)


@pytest.mark.parametrize("inside", ["\n", "\r", "\0", "\a", "\u2028", "…"])
def test_a_token_file_that_no_header_can_hold(
    api: Api, here: Path, capsys: pytest.CaptureFixture, inside: str
) -> None:
    (here / "token").write_text(f"first{inside}{CANARY}")
    (here / "kubeconfig").write_text(api.kubeconfig({"tokenFile": "token"}))
    check(error(capsys, "status"), "token or password contains a line break or another character")


def test_a_folder_in_place_of_the_kubeconfig(
    api: Api, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{here}{os.pathsep}{here}/none")
    check(error(capsys, "status"), "cannot read the kubeconfig .*: Is a directory")


@pytest.mark.parametrize("proxy", [f"me:{OTHER}@127.0.0.1:9", f"http://me:{OTHER}@[::1"])
def test_a_proxy_variable_that_is_not_a_url(
    api: Api,
    here: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    proxy: str,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    check(error(capsys, "status"), "the proxy to the cluster")


def test_whitespace_around_a_token_is_not_sent(api: Api, here: Path) -> None:
    (here / "token").write_text(f"{TOKEN}\n")
    (here / "kubeconfig").write_text(api.kubeconfig({"tokenFile": "token"}))
    assert cli.main(["status"]) == 0


def check(line: str, cause: str) -> None:
    assert re.search(cause, line), line
    for part in (
        CANARY,
        CANARY.partition("/")[2],
        OTHER,
        base64.b64encode(CANARY.encode()).decode(),
    ):
        assert part not in line


def test_the_first_of_several_files_chooses_the_context(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with kubectl; the Python client alone would take the last file's."""
    paths = [here / "first", here / "second"]
    for number, path in enumerate(paths):
        cluster = {"name": "c", "context": {"cluster": f"k{number}", "user": "u"}}
        path.write_text(
            json.dumps(
                {
                    "current-context": f"c{number}",
                    "contexts": [cluster | {"name": f"c{number}"}],
                    "clusters": [
                        {"name": f"k{number}", "cluster": {"server": f"http://h{number}"}}
                    ],
                    "users": [{"name": "u", "user": {}}],
                }
            )
        )
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, paths)))
    configuration = Configuration()
    configure(configuration, None)
    assert configuration.host == "http://h0"
