"""Tests upgrades and rollbacks of a release: runs helm against a fake API that stores what helm
sends and rejects a change to the worker groups if another manager has changed them."""

import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
from chart_tools import CHART, GOLDEN
from helm_api import GROUPS, HelmApi, worker_groups
from typed_form import changes

NO_OPENAPI = "--disable-openapi-validation"
PRESETS = ["kind", "gpu-8", "multinode"]
KEPT = ["--reuse-values", "--reset-then-reuse-values"]
ACCOUNT = ("--set", "mlflow.auth.existingSecret=zephyr-accounts")


class Release:
    """A release that helm, the operator and the autoscaler change."""

    def __init__(self, home: Path) -> None:
        self.api = HelmApi()
        self.home = home

    def helm(self, command: str, *arguments: str) -> str:
        """Runs helm, then writes every Ray object back as the operator; helm must succeed."""
        done = self.run(command, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        chart = (str(CHART), NO_OPENAPI) if command in ("install", "upgrade") else ()
        done = self.api.helm(command, "zephyr", *chart, *arguments, home=self.home)
        for path, document in self.api.objects.items():
            if document["kind"] in GROUPS and changes(document):
                self.api.owners[path] = "kuberay-operator"
        return done

    def scale(self, replicas: int) -> None:
        cluster = deepcopy(self.api.get("RayCluster", "zephyr"))
        [group] = cluster["spec"]["workerGroupSpecs"]
        group |= {"replicas": replicas, "scaleStrategy": {"workersToDelete": []}}
        self.api.write("RayCluster", "zephyr", "autoscaler", cluster)

    def replicas(self) -> int:
        [group] = worker_groups(self.api.get("RayCluster", "zephyr"))
        return int(group["replicas"])


@pytest.fixture(name="release")
def _release(tmp_path: Path) -> Iterator[Release]:
    release = Release(tmp_path)
    yield release
    release.api.close()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_installed_changed_and_rolled_back(
    release: Release, preset: str, kept: str
) -> None:
    release.helm("install", "--values", str(CHART / f"values-{preset}.yaml"))
    release.helm("upgrade", kept, "--set", "image.tag=v2")
    release.helm("upgrade", kept, "--set", "pipeline.enabled=false,serve.enabled=true")
    assert not release.api.names("RayJob") and release.api.names("RayService") == {"zephyr-serve"}
    release.helm("upgrade", kept, "--set", "image.tag=v3")
    release.helm("rollback", "1")
    assert release.api.names("RayJob") == {"zephyr-run-1"} and not release.api.names("RayService")
    release.helm("upgrade", kept, "--set", "image.tag=v4")


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_release_of_an_older_chart_is_upgraded(
    release: Release, tmp_path: Path, preset: str, kept: str
) -> None:
    old = tmp_path / "zephyr"
    old.mkdir()
    (old / "Chart.yaml").write_text("apiVersion: v2\nname: zephyr\nversion: 0.1.0\n")
    (old / "values.yaml").write_text((GOLDEN / "release-0.1.0.yaml").read_text())
    values = ("--values", str(CHART / f"values-{preset}.yaml"))
    done = release.api.helm("install", "zephyr", str(old), *values, NO_OPENAPI, home=tmp_path)
    assert done.returncode == 0, done.stderr
    release.helm("upgrade", kept, "--set", "cluster.enabled=true,cluster.autoscaling=false")
    assert release.api.get("RayCluster", "zephyr")["spec"]["upgradeStrategy"]["type"] == "Recreate"


def test_an_upgrade_keeps_the_workers_that_the_autoscaler_added(release: Release) -> None:
    release.helm("install", *ACCOUNT)
    assert release.replicas() == 1
    release.scale(3)
    release.helm("upgrade", "--reuse-values", "--set", "pipeline.enabled=true")
    assert release.replicas() == 3 and release.api.names("RayJob")


def test_a_change_of_the_scaled_groups_is_forced_and_keeps_the_workers(release: Release) -> None:
    release.helm("install", *ACCOUNT)
    release.scale(3)
    change = ("--reuse-values", "--set", "image.tag=v2")
    refused = release.run("upgrade", *change)
    assert 'conflict with "autoscaler"' in refused.stderr
    release.helm("upgrade", *change, "--force-conflicts")
    assert release.replicas() == 3
    release.scale(2)
    assert "conflict" in release.run("rollback", "1").stderr
    release.helm("rollback", "1", "--force-conflicts")
    release.helm("upgrade", "--reuse-values", "--set", "workerGroups.cpu.maxReplicas=8")


def test_live_replicas_stay_within_new_limits(release: Release) -> None:
    release.helm("install", *ACCOUNT)
    release.scale(4)
    limits = "workerGroups.cpu.maxReplicas=2"
    release.helm("upgrade", "--reuse-values", "--set", limits, "--force-conflicts")
    assert release.replicas() == 2


def test_without_the_autoscaler_the_values_decide(release: Release) -> None:
    release.helm("install", *ACCOUNT, "--set", "cluster.autoscaling=false")
    release.helm("upgrade", "--reuse-values", "--set", "workerGroups.cpu.replicas=2")
    release.helm("upgrade", "--reuse-values", "--set", "workerGroups.cpu.replicas=3,image.tag=v2")
    assert release.replicas() == 3


@pytest.mark.parametrize("autoscaling", ["true", "false"])
def test_what_the_cleanup_of_redis_needs_outlives_the_release(
    release: Release, autoscaling: str
) -> None:
    """After an uninstall, the operator cleans up Redis in a pod like the head's. A new install
    adopts the objects that were kept for it."""
    install = (
        *ACCOUNT, "--set", "ray.gcsFaultTolerance.enabled=true,storage.existingClaim=shared",
        "--set", f"ray.gcsFaultTolerance.redisAddress=redis:6379,cluster.autoscaling={autoscaling}",
    )  # fmt: skip
    release.helm("install", *install)
    head = release.api.get("RayCluster", "zephyr")["spec"]["headGroupSpec"]["template"]["spec"]
    release.helm("uninstall")
    assert head["serviceAccountName"] in release.api.names("ServiceAccount")
    maps = {v["configMap"]["name"] for v in head["volumes"] if "configMap" in v}
    assert maps and maps <= release.api.names("ConfigMap")
    assert {"zephyr-cluster", "zephyr-pipeline"} <= release.api.names("NetworkPolicy")
    release.helm("install", *install)


def test_an_uninstall_keeps_only_the_data(release: Release) -> None:
    release.helm("install", *ACCOUNT)
    release.helm("uninstall")
    assert release.api.names("PersistentVolumeClaim") == {"zephyr-storage", "zephyr-mlflow"}
    assert {d["kind"] for d in release.api.objects.values()} == {"PersistentVolumeClaim"}


def test_a_changed_cluster_replaces_its_pods_and_the_notes_say_so(release: Release) -> None:
    """The operator rejects upgradeStrategy in the cluster spec of a RayJob or RayService."""
    notes = release.helm("install", *ACCOUNT, "--set", "pipeline.enabled=true")
    assert "replaces all of\n  them and ends running jobs" in notes
    cluster, job = (release.api.get(kind, name)["spec"] for kind, name in
                    (("RayCluster", "zephyr"), ("RayJob", "zephyr-run-1")))  # fmt: skip
    assert cluster["upgradeStrategy"] == {"type": "Recreate"}
    assert "upgradeStrategy" not in job["rayClusterSpec"]
    quiet = ("--reuse-values", "--set", "cluster.upgradeStrategy=None")
    assert "ends running jobs" not in release.helm("upgrade", *quiet)
