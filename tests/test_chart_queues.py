"""Tests that the overlay's Kueue queue is large enough for its job, and that the docs state what
the multi-node job requests."""

import re

from chart_tools import ROOT, Document, kind, kustomize, render

from zephyr_ray.cluster.profile import quantity


def total_requests(job: Document) -> dict[str, float]:
    """Returns the total requests of all pods of a job, including its submitter."""
    spec = job["spec"]["rayClusterSpec"]
    pods = [(job["spec"]["submitterPodTemplate"], 1), (spec["headGroupSpec"]["template"], 1)]
    pods += [(group["template"], group["replicas"]) for group in spec["workerGroupSpecs"]]
    total: dict[str, float] = {}
    for pod, count in pods:
        for resource, amount in pod["spec"]["containers"][0]["resources"]["requests"].items():
            total[resource] = total.get(resource, 0) + count * quantity(amount)
    return total


def test_the_example_queue_admits_the_job_of_the_overlay() -> None:
    by_kind = {d["kind"]: d for d in kustomize("kueue/queue")}
    [group] = by_kind["ClusterQueue"]["spec"]["resourceGroups"]
    quotas = {r["name"]: r["nominalQuota"] for r in group["flavors"][0]["resources"]}
    assert group["flavors"][0]["name"] == by_kind["ResourceFlavor"]["metadata"]["name"]
    assert by_kind["LocalQueue"]["spec"]["clusterQueue"] == "zephyr-training"
    for resource, amount in total_requests(kind(kustomize("kueue"), "RayJob")[0]).items():
        assert amount <= quantity(str(quotas[resource])), resource


def test_the_docs_say_what_a_queue_must_admit() -> None:
    total = total_requests(kind(render("values-multinode.yaml"), "RayJob")[0])
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| Kueue"))
    cpus, memory, disk, gpus = (
        float(n.replace(",", "")) for n in re.findall(r"[\d,.]+(?= (?:CPUs|GiB|GPUs))", row)[-4:]
    )
    assert total == {
        "cpu": cpus,
        "memory": memory * 2**30,
        "ephemeral-storage": disk * 2**30,
        "nvidia.com/gpu": gpus,
    }
