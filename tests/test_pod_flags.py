"""Tests the translation of the chart's pods into podman flags, without starting a pod."""

from pathlib import Path

import pytest
from chart_tools import kind, ray_specs, render
from pod_flags import Node, RayPods, in_order, quantity, run_flags

SETS = ("cluster.enabled=true",)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    accounts = {"username": "u", "password": "p", "flask-secret-key": "f"}
    maps = {"zephyr-recipes": {}, "zephyr-mlflow": {"auth.ini": "[mlflow]\n"}}
    return Node(tmp_path, {"zephyr-accounts": accounts, "zephyr": {"auth_token": "t"}}, maps)


@pytest.fixture
def pods() -> RayPods:
    (cluster,) = kind(render("values-kind.yaml", sets=SETS), "RayCluster")
    return RayPods("zephyr", "lab", ray_specs([cluster])[0])


@pytest.mark.skipif("os.getuid() != 0", reason="only root can set the group of volumes")
def test_a_worker_has_the_charts_security_limits_and_volumes(node: Node, pods: RayPods) -> None:
    (group,) = pods.spec["workerGroupSpecs"]
    flags = run_flags(pods.worker(group, "w"), "w", node)
    expected = {"--user=1000:1000", "--group-add=1000", "--read-only", "--read-only-tmpfs=false"}
    expected |= {"--cap-drop=ALL", "--security-opt=no-new-privileges", "--restart=no"}
    expected |= {"--memory=10737418240b", "--cpu-quota=400000", "--cpu-shares=2048"}
    expected |= {
        "--env=RAY_AUTH_TOKEN=t",
        "--env=MLFLOW_TRACKING_PASSWORD=p",
        "--env=HOME=/scratch",
    }
    expected |= {"--shm-size=10737418240b", f"--volume={node.folder}/pods/w/tmp:/tmp:rw"}
    expected |= {f"--volume={node.folder}/pods/w/recipes:/etc/zephyr/recipes:ro"}
    expected |= {f"--volume={node.folder}/claims/zephyr-storage:/mnt/zephyr:rw"}
    assert not expected - set(flags)
    assert flags[-1] == (
        "ulimit -n 65536; ray start --block --address=zephyr-head-svc.lab.svc.cluster.local:6379 "
        "--dashboard-agent-listen-port=52365 --memory=10737418240 --metrics-export-port=8080 "
        "--num-cpus=4"
    )


def test_init_containers_run_before_the_pod_on_its_volumes(node: Node) -> None:
    [deployment] = kind(render("values-kind.yaml", sets=SETS), "Deployment")
    init, pod = in_order(deployment["spec"]["template"])
    first, then = (run_flags(each, "m", node) for each in (init, pod))
    assert '--entrypoint=["python", "-c"]' in first and "--restart=no" in first
    assert '--entrypoint=["mlflow", "server"]' in then and "--restart=always" in then
    data = f"--volume={node.folder}/claims/zephyr-mlflow:/mlflow:rw"
    assert data in first and data in then


def test_arguments_are_expanded_as_the_kubelet_does(node: Node, pods: RayPods) -> None:
    pod = pods.head("h")
    pod["spec"]["containers"][0]["args"] = ["$(HOME)/$(HOM) $(date) $HOME"]
    assert run_flags(pod, "h", node)[-1] == "/scratch/$(HOM) $(date) $HOME"


def test_an_unknown_field_is_rejected(node: Node, pods: RayPods) -> None:
    pod = pods.head("h")
    pod["spec"]["containers"][0]["lifecycle"] = {}
    with pytest.raises(AssertionError, match="lifecycle"):
        run_flags(pod, "h", node)


@pytest.mark.parametrize(("text", "value"), [("4Gi", 2**32), ("512Mi", 2**29), ("7", 7)])
def test_quantities(text: str, value: int) -> None:
    assert quantity(text) == value
