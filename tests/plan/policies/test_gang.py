"""The gang of an attempt: which objects are created, and when the gang counts as complete."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_contract.heartbeat import RankState
from finetune_operator.plan.model.types import Create
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job


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


def master_of(cluster: FakeCluster, pod: str) -> str | None:
    env = cluster.manifests[pod]["spec"]["containers"][0]["env"]
    return next((item.get("value") for item in env if item["name"] == "MASTER_ADDR"), None)


def test_pods_of_a_job_with_a_service_use_its_names() -> None:
    """Version 0.1 created one; the job may pin the trainer's image of that time, which cannot ask for an address."""
    cluster = FakeCluster()
    cluster.services = {"circles"}
    cluster.settle()
    assert master_of(cluster, "circles-a1-n1") == "circles-a1-n0.circles.default.svc"


@pytest.mark.parametrize(("nodes", "services"), [(1, set()), (2, {"circles"})])
def test_without_a_coordinator_a_service_names_the_pods_of_a_gang(nodes: int, services: set[str]) -> None:
    job = make_job(topology={"accelerator": "cpu", "nodes": nodes})
    cluster = FakeCluster(job, settings=replace(SETTINGS, coordinator_url="")).running()
    assert cluster.services == services
    assert names(cluster) == []
    expected = "circles-a1-n0.circles.default.svc" if services else None
    assert master_of(cluster, f"circles-a1-n{nodes - 1}") == expected


def test_a_pod_that_cannot_reach_the_coordinator_gets_a_service() -> None:
    cluster = FakeCluster().running()
    cluster.beat(0, RankState.STARTING)
    cluster.tick(59)
    cluster.settle()
    assert cluster.services == set()
    cluster.tick(2)
    cluster.beat(0, RankState.STARTING)
    cluster.settle()
    assert cluster.services == {"circles"}
    assert names(cluster) == []


def test_a_pod_that_was_heard_before_needs_no_service() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(RankState.TRAINING, step=1)
    cluster.tick(300)
    cluster.settle()
    assert cluster.services == set()


def test_deleted_config_is_created_again() -> None:
    cluster = FakeCluster().running()
    cluster.configs.clear()
    assert names(cluster) == ["circles-run"]
