"""Eviction requests: all ranks save, the progress is reported, and the pod is released."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Order
from finetune_operator.api.evictions import POD_FIELD, RESPONDER
from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.reasons import Reason
from finetune_operator.cluster.kube.optional.evictions import decode_eviction
from finetune_operator.plan.model.types import ObservedEviction
from tests.plan.fake_cluster import FakeCluster, make_job
from tests.plan.scenarios import HOLDING


def requested() -> FakeCluster:
    """Return a job at step 10 whose pod 1 is asked to leave."""
    cluster = FakeCluster(settings=HOLDING).running()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    cluster.evictions["e"] = ObservedEviction("e", cluster.pod(1).uid, active=True)
    cluster.settle()
    return cluster


def test_request_is_a_preemption_with_notice() -> None:
    cluster = requested()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.rank) == (Reason.PREEMPTED, "Preemption", 1)
    assert "EvictionRequest" in (entry.message or "")
    for received in cluster.beats.values():
        assert cluster.reply(received.beat).order is Order.SAVE_AND_STOP
    assert [pod.deleted_at for pod in cluster.pods.values()] == [None, None], (
        "the ranks save before the pod is released"
    )


def test_progress_is_reported_and_the_pod_is_released_when_it_has_saved() -> None:
    cluster = requested()
    assert [(report.done, report.message) for report in cluster.reports] == [
        (False, "the ranks save; the newest checkpoint has step 5")
    ]
    cluster.tick(60)
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    assert len(cluster.reports) == 2
    for rank in (0, 1):
        cluster.exit(rank, ExitCode.SAVED)
    cluster.settle()
    assert cluster.reports[-1].done
    assert cluster.reports[-1].message.startswith("the pod is released")
    num_reports = len(cluster.reports)
    cluster.running()
    assert cluster.job.status.attempt == 2
    assert len(cluster.reports) == num_reports
    assert (cluster.job.status.preemptions, cluster.job.status.failures) == (1, 0)


@pytest.mark.parametrize(
    "change", [{"active": False}, {"pod_uid": "another"}], ids=["canceled or not its turn", "of an earlier pod"]
)
def test_request_that_is_not_for_the_pod_now_does_not_interrupt(change: dict[str, object]) -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.evictions["e"] = replace(ObservedEviction("e", cluster.pod(1).uid, active=True), **change)  # type: ignore[arg-type]
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None
    assert all(report.done for report in cluster.reports)


def test_pods_name_the_operator_unless_they_belong_to_a_pod_group() -> None:
    """Kubernetes refuses responders in pods of a PodGroup."""
    for apis in ({}, {SchedulingMode.POD_GROUP: "scheduling.k8s.io/v1beta1"}):
        cluster = FakeCluster(make_job(), settings=replace(HOLDING, gangs=True))
        cluster.gang_apis, cluster.optional_apis = dict(apis), frozenset({POD_FIELD})
        cluster.settle()
        spec = cluster.manifests["circles-a1-n0"]["spec"]
        wanted = None if apis else [{"name": RESPONDER, "priority": 10000}]
        assert spec.get("evictionResponders") == wanted
    cluster = FakeCluster()
    cluster.settle()
    assert "evictionResponders" not in cluster.manifests["circles-a1-n0"]["spec"]


def test_reading_an_eviction() -> None:
    thing = {
        "metadata": {"name": "e", "namespace": "team", "resourceVersion": "7"},
        "spec": {"target": {"pod": {"name": "my-a-job-a12-n3", "uid": "u"}}},
        "status": {
            "targetResponders": [
                {"name": "example.com/other", "priority": 20000, "state": "Completed"},
                {"name": RESPONDER, "priority": 10000, "state": "Active"},
            ],
            "responders": [{"name": RESPONDER, "heartbeatTime": "2026-01-01T12:00:00Z"}],
        },
    }
    found = decode_eviction(thing)
    assert found is not None
    assert found.job == ("team", "my-a-job")
    assert found.observed == ObservedEviction("e", "u", True, datetime.fromisoformat("2026-01-01T12:00:00+00:00"))
    assert decode_eviction({**thing, "spec": {"target": {"pod": {"name": "web-7d9f", "uid": "u"}}}}) is None
    waiting = decode_eviction({**thing, "status": None})
    assert waiting is not None
    assert not waiting.observed.active
