"""The gang of an attempt: which objects are created, and when the gang counts as complete."""

from __future__ import annotations

import pytest

from finetune_operator.plan.model.types import Create
from tests.plan.fake_cluster import FakeCluster, make_job


def names(cluster: FakeCluster) -> list[str]:
    return [a.manifest["metadata"]["name"] for a in cluster.decide().actions if isinstance(a, Create)]


@pytest.mark.parametrize(
    ("topology", "num_pods"),
    [
        ({"accelerator": "cpu"}, 1),
        ({"accelerator": "cpu", "nodes": 3}, 3),
        ({"accelerator": "gpu", "nodes": 2, "processesPerNode": 8}, 2),
        ({"accelerator": "cpu", "minNodes": 4, "maxNodes": 4}, 4),
    ],
)
def test_one_pod_per_node(topology: dict[str, object], num_pods: int) -> None:
    cluster = FakeCluster(make_job(topology=topology))
    cluster.settle()
    assert sorted(cluster.pods) == sorted(f"circles-a1-n{rank}" for rank in range(num_pods))
    assert cluster.job.status.attempts[-1].gang_complete


def test_gang_is_complete_once_all_pods_were_observed() -> None:
    cluster = FakeCluster().created()
    cluster.hidden = {cluster.pod(0).uid}
    assert not cluster.decide().status.attempts[-1].gang_complete
    cluster.hidden = set()
    assert cluster.decide().status.attempts[-1].gang_complete


def test_complete_gang_gets_no_new_pods() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n1")
    assert names(cluster) == []


def test_pods_of_a_job_that_version_0_1_began_use_its_service() -> None:
    cluster = FakeCluster()
    cluster.services = {"circles"}
    cluster.settle()
    assert cluster.manifests["circles-a1-n1"]["spec"]["subdomain"] == "circles"
    assert cluster.services == {"circles"}


def test_deleted_config_is_created_again() -> None:
    cluster = FakeCluster().running()
    cluster.configs.clear()
    assert names(cluster) == ["circles-run"]
