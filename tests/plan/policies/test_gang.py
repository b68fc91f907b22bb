"""All pods of an attempt or none: what is created, and when the gang counts as complete."""

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
def test_one_pod_for_each_node(topology: dict[str, object], num_pods: int) -> None:
    cluster = FakeCluster(make_job(topology=topology))
    cluster.settle()
    assert sorted(cluster.pods) == sorted(f"circles-a1-n{rank}" for rank in range(num_pods))
    assert cluster.job.status.attempts[-1].gang_complete


def test_the_gang_is_complete_only_once_all_pods_were_there() -> None:
    cluster = FakeCluster().created()
    cluster.hidden = {cluster.pod(0).uid}
    assert not cluster.decide().status.attempts[-1].gang_complete
    cluster.hidden = set()
    assert cluster.decide().status.attempts[-1].gang_complete


def test_a_complete_gang_gets_no_new_pod() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n1")
    assert names(cluster) == []


@pytest.mark.parametrize("kind", ["services", "configs"])
def test_service_and_run_specification_come_back_while_the_attempt_is_open(kind: str) -> None:
    cluster = FakeCluster().running()
    getattr(cluster, kind).clear()
    assert names(cluster) == ["circles" if kind == "services" else "circles-run"]
