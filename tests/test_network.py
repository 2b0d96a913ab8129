"""Tests the chart's network policies: exactly who reaches each pod, and what each pod reaches.

The expected peers of ingress come from the table "Who gets in" in docs/kubernetes.md.
"""

import re
from pathlib import Path

import pytest
from chart_tools import CLUSTER, GOLDEN, ROOT, SERVE, Document, kind, pod_templates, render

from zephyr_ray.cluster.job import ray_job
from zephyr_ray.cluster.profile import load

EVERYTHING = str(GOLDEN / "everything-values.yaml")
RAY_PARTS = ("cluster", "pipeline", "serve")
Access = set[tuple[str, str]]
"""(peer, port) pairs."""


def part(name: str) -> str:
    """Returns a peer: the release's pods of this component, or all jobs or submitters."""
    if name in ("pipeline", "submitter"):
        return f"pods zephyr-ray/part={name}"
    component, instance = "app.kubernetes.io/component", "app.kubernetes.io/instance"
    return f"pods {component}={name},{instance}=zephyr,app.kubernetes.io/part-of=zephyr"


def namespace(name: str) -> str:
    """Returns a peer: all pods of a namespace."""
    return f"namespace kubernetes.io/metadata.name={name}"


ANYONE, ALL = "anyone", "all"
CLIENTS = "pods zephyr-ray/client=true"
PEERS = {
    "the operator": namespace("kuberay-system"),
    "submitters": part("submitter"),
    'pods labeled `zephyr-ray/client: "true"`': CLIENTS,
    "pods with that label": CLIENTS,
    "the release's Ray cluster": part("cluster"),
    "jobs": part("pipeline"),
}
"""Peers by their name in the table."""
SETTINGS = {
    "`networkPolicy.serveClients`": namespace("ingress-nginx"),
    "`networkPolicy.mlflowClients`": namespace("ingress-nginx"),
    "`networkPolicy.prometheusNamespace`": namespace("monitoring"),
}
"""Peers that everything-values.yaml sets and the presets do not."""
SAME_PART = "pods of the same part (`cluster`, `pipeline` or `serve`)"
PODS_OF_PORT = {"8000": ("serve",), "5000": ("mlflow",)}
"""Components that listen on a port; on other ports, all parts with Ray do."""


def dns(name: str = "kube-system", port: int = 53) -> Access:
    """Returns the egress to the DNS pods of a namespace and to NodeLocal DNSCache."""
    return {
        (peer, f"{port}/{protocol}")
        for peer in (namespace(name), "169.254.20.10/32")
        for protocol in ("TCP", "UDP")
    }


OPENSHIFT = dns("openshift-dns", 5353)
"""As in everything-values.yaml."""
INTERNET = "0.0.0.0/0 except 10.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16"


# ------------------------------------------------------------------ expected


def documented(component: str, settings: dict[str, str]) -> Access:
    """Returns who reaches a component according to the docs."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    table = text.partition("## Who gets in")[2].partition("\n\n")[2].partition("\n\n")[0]
    pairs: Access = set()
    for row in table.splitlines()[2:]:
        port_cell, admitted, _ = (cell.strip() for cell in row.strip("|").split(" | "))
        ports = re.findall(r"\d{4,}", port_cell.partition(":")[0]) or [ALL]
        for port in ports:
            if component not in PODS_OF_PORT.get(port, RAY_PARTS):
                continue
            for name in admitted.split("; "):
                peer = part(component) if name == SAME_PART else (PEERS | settings).get(name)
                assert peer or name in SETTINGS, f"unknown peer in the docs: {name}"
                if peer:
                    pairs.add((peer, port if port == ALL else f"{port}/TCP"))
    return pairs


# ------------------------------------------------------------------ rendered


def access(rendered: list[Document], labels: dict[str, str], direction: str) -> Access:
    """Returns the (peer, port) pairs that all policies together allow a pod."""
    policies = [p["spec"] for p in kind(rendered, "NetworkPolicy")]
    policies = [
        p
        for p in policies
        if selects(p["podSelector"], labels) and direction.capitalize() in p["policyTypes"]
    ]
    if not policies:
        return {(ANYONE, ALL)}
    key = "from" if direction == "ingress" else "to"
    return {
        (peer_name(peer) if peer else ANYONE, port)
        for policy in policies
        for rule in policy[direction]
        for peer in rule.get(key) or [None]
        for port in port_names(rule)
    }


def selects(selector: Document, labels: dict[str, str]) -> bool:
    assert set(selector) == {"matchLabels"}
    return bool(selector["matchLabels"].items() <= labels.items())


def peer_name(peer: Document) -> str:
    """Returns one text per peer; equal texts mean equal peers."""
    assert len(peer) == 1, peer
    ((name, value),) = peer.items()
    if name == "ipBlock":
        excluded = " ".join(sorted(value.get("except", [])))
        return f"{value['cidr']} except {excluded}" if excluded else str(value["cidr"])
    assert set(value) <= {"matchLabels", "matchExpressions"}
    terms = [f"{key}={text}" for key, text in value.get("matchLabels", {}).items()]
    for expression in value.get("matchExpressions", []):
        assert expression["operator"] == "In"
        terms.append(f"{expression['key']} in {'|'.join(expression['values'])}")
    plural = {"podSelector": "pods", "namespaceSelector": "namespace"}[name]
    return f"{plural} {','.join(sorted(terms)) or 'any'}"


def port_names(rule: Document) -> list[str]:
    assert all(set(port) == {"port", "protocol"} for port in rule.get("ports", []))
    return [f"{port['port']}/{port['protocol']}" for port in rule.get("ports", [])] or [ALL]


def pod_labels(rendered: list[Document]) -> list[dict[str, str]]:
    """Returns the labels of every pod, with the node type that the operator adds to Ray pods."""
    result = []
    for pod in pod_templates(rendered):
        name = pod["spec"]["containers"][0]["name"]
        node_type = {"ray.io/node-type": name[4:]} if name.startswith("ray-") else {}
        result.append(pod["metadata"]["labels"] | node_type)
    return result


# ------------------------------------------------------------------ tests


@pytest.mark.parametrize(
    "values", [EVERYTHING, "values-kind.yaml", "values-gpu-8.yaml", "values-multinode.yaml"]
)
def test_the_docs_say_exactly_who_gets_in(values: str) -> None:
    rendered = render(values)
    settings = SETTINGS if values == EVERYTHING else {}
    for labels in pod_labels(rendered):
        component = labels["app.kubernetes.io/component"]
        expected = documented(component, settings)
        assert access(rendered, labels, "ingress") == expected, labels
        assert expected or component in ("submitter", "test")


def egress_of_everything(component: str, head: bool) -> Access:
    extra = ("10.1.2.3/32", "9000/TCP")
    if component == "submitter":
        return OPENSHIFT | {(part("pipeline"), "8265/TCP")}
    if component == "test":
        services = {"cluster": 8265, "serve": 8000, "mlflow": 5000}
        return OPENSHIFT | {(part(name), f"{port}/TCP") for name, port in services.items()}
    if component == "mlflow":
        return OPENSHIFT | {(ANYONE, "443/TCP"), extra}  # 443: the artifact bucket
    allowed = OPENSHIFT | {extra}
    allowed |= {(part(component), ALL), (ANYONE, "6380/TCP"), (INTERNET, "443/TCP")}
    if component != "serve":
        allowed |= {(part("mlflow"), "5000/TCP"), (part("serve"), "8000/TCP")}
    if head:
        allowed |= {("0.0.0.0/0", "443/TCP"), ("0.0.0.0/0", "6443/TCP")}
    return allowed


def test_pods_reach_only_what_they_need() -> None:
    """Ray workers reach HTTPS on public addresses only; heads also reach the API server."""
    rendered = render(EVERYTHING)
    for labels in pod_labels(rendered):
        component = labels["app.kubernetes.io/component"]
        expected = egress_of_everything(component, labels.get("ray.io/node-type") == "head")
        assert access(rendered, labels, "egress") == expected, labels


def test_pods_of_a_fixed_size_job_do_not_reach_the_api_server() -> None:
    rendered = render("values-kind.yaml")
    job = {(part("pipeline"), ALL), (part("mlflow"), "5000/TCP"), (INTERNET, "443/TCP")}
    expected = {
        "pipeline": dns() | job,
        "mlflow": dns(),
        "submitter": dns() | {(part("pipeline"), "8265/TCP")},
        "test": dns() | {(part("mlflow"), "5000/TCP")},
    }
    for labels in pod_labels(rendered):
        component = labels["app.kubernetes.io/component"]
        assert access(rendered, labels, "egress") == expected[component], labels


# ------------------------------------------------------------------ jobs of `zephyr submit`


def submitted(folder: Path) -> dict[str, dict[str, str]]:
    """Returns the labels of the pods of a submitted job, with those that the operator adds."""
    profile = folder / "zephyr-cluster.yaml"
    profile.write_text("image: i\nstorage: {claim: c}\nworkers: {cpu: {cpu: 1, memory: 2Gi}}\n")
    spec = ray_job("small-abcde", load(profile))["spec"]
    cluster = spec["rayClusterSpec"]
    pods = {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": cluster["workerGroupSpecs"][0]["template"],
    }
    return {
        name: pod["metadata"]["labels"]
        | ({} if name == "submitter" else {"ray.io/node-type": name})
        for name, pod in pods.items()
    }


@pytest.mark.parametrize("sets", [CLUSTER, (*SERVE, "pipeline.enabled=true")])
def test_a_submitted_job_has_the_same_access_as_the_charts_job(
    sets: tuple[str, ...], tmp_path: Path
) -> None:
    """Holds even if the chart runs no job, because `zephyr submit` needs none."""
    rendered = render(sets=sets)
    own = {"zephyr-ray/part": "pipeline"}
    pods = submitted(tmp_path)
    for direction in ("ingress", "egress"):
        for name in ("head", "worker"):
            assert access(rendered, pods[name], direction) == access(rendered, own, direction)
        submitter = {"zephyr-ray/part": "submitter"}
        assert access(rendered, pods["submitter"], direction) == access(
            rendered, submitter, direction
        )
    assert (ANYONE, ALL) not in access(rendered, pods["head"], "ingress")
    assert (ANYONE, ALL) not in access(rendered, pods["submitter"], "egress")


def open_between(
    rendered: list[Document], source: dict[str, str], target: dict[str, str], port: int
) -> bool:
    """Returns whether policies allow a connection within a namespace that denies by default."""
    denied = {
        "kind": "NetworkPolicy",
        "spec": {
            "podSelector": {"matchLabels": {}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [],
            "egress": [],
        },
    }
    ends = ((source, target, "egress"), (target, source, "ingress"))
    return all(
        any(
            at in (ALL, f"{port}/TCP") and matches(peer, other)
            for peer, at in access([*rendered, denied], pod, direction)
        )
        for pod, other, direction in ends
    )


def matches(peer: str, labels: dict[str, str]) -> bool:
    if not peer.startswith("pods "):
        return peer == ANYONE
    wanted = dict(term.split("=") for term in peer.removeprefix("pods ").split(","))
    return wanted.items() <= labels.items()


def test_every_connection_works_if_the_namespace_denies_by_default(tmp_path: Path) -> None:
    rendered = render(sets=(*SERVE, "pipeline.enabled=true"))
    named = {
        (labels["app.kubernetes.io/component"], labels.get("ray.io/node-type")): labels
        for labels in pod_labels(rendered)
    }
    named |= {("zephyr submit", name): labels for name, labels in submitted(tmp_path).items()}
    mlflow, chat = named["mlflow", None], named["serve", "head"]
    for part_name in ("cluster", "pipeline", "zephyr submit"):
        head, worker = named[part_name, "head"], named[part_name, "worker"]
        assert open_between(rendered, worker, head, 6379)
        assert open_between(rendered, head, worker, 52365)
        assert open_between(rendered, head, mlflow, 5000)
        assert open_between(rendered, worker, chat, 8000)
    for submitter, head in (
        (named["submitter", None], named["pipeline", "head"]),
        (named["zephyr submit", "submitter"], named["zephyr submit", "head"]),
    ):
        assert open_between(rendered, submitter, head, 8265)
        assert not open_between(rendered, head, submitter, 8265)
    test = named["test", None]
    assert open_between(rendered, test, named["cluster", "head"], 8265)
    assert open_between(rendered, test, mlflow, 5000)
    assert open_between(rendered, test, named["serve", "worker"], 8000)
    assert not open_between(rendered, named["cluster", "head"], named["serve", "head"], 6379)
