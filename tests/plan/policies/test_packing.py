"""A packed gang that finds no room in the rack or zone of its first pod tries another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import PodPhase
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job


def avoided(pod: dict[str, Any]) -> list[str]:
    preferred = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    terms = preferred.get("preferredDuringSchedulingIgnoredDuringExecution") or []
    return [name for term in terms for field in term["preference"]["matchFields"] for name in field["values"]]


@pytest.mark.parametrize(("pack", "expected"), [("zone", ["full-zone"]), (None, [])])
def test_next_attempt_avoids_the_node_of_the_first_pod(pack: str | None, expected: list[str]) -> None:
    topology = {"accelerator": "cpu", "nodes": 3} | ({"pack": pack} if pack else {})
    cluster = FakeCluster(make_job(topology=topology), settings=replace(SETTINGS, gangs=True))
    cluster.settle()
    cluster.change(0, node="full-zone", phase=PodPhase.RUNNING, ready=True)
    cluster.settle()
    while cluster.job.status.attempt == 1:
        cluster.tick(10)
        cluster.settle()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.node) == (Reason.GANG_RELEASED, expected[0] if expected else None)
    assert avoided(cluster.manifests["circles-a2-n0"]) == expected
