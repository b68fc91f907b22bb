"""Edits of the fields that only new pods read: immediately while pods wait, otherwise with the next attempt."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.rules.edits import CHANGEABLE, NEXT_ATTEMPT
from finetune_operator.manifests import hash_template
from finetune_operator.plan.model.conditions import find, is_true
from tests.plan.fake_cluster import FakeCluster, make_job
from tests.plan.scenarios import HOLDING, fixed_cluster

IMAGE = {"spec": {"containers": [{"name": "trainer", "image": "registry.example/trainer:fixed"}]}}
EDITS: dict[str, dict[str, Any]] = {
    "spec.topology.resources": {"topology": {"accelerator": "cpu", "nodes": 2, "resources": {"cpu": 1}}},
    "spec.topology.pack": {"topology": {"accelerator": "cpu", "nodes": 2, "pack": "zone"}},
    "spec.topology.gpuClaimTemplateName": {"topology": {"accelerator": "cpu", "nodes": 2, "gpuClaimTemplateName": "a"}},
    "spec.recovery.spot": {"recovery": {"spot": {}}},
    "spec.recovery.noticeSeconds": {"recovery": {"noticeSeconds": 7}},
    "spec.scheduling": {"scheduling": "gates"},
    "spec.priorityClassName": {"priorityClassName": "high"},
    "spec.secrets": {"secrets": [{"name": "hub"}]},
    "spec.podTemplate": {"podTemplate": IMAGE},
}


def test_wrong_image_is_corrected_by_an_edit_while_pods_wait_for_it() -> None:
    cluster = FakeCluster()
    cluster.settle()
    for rank in (0, 1):
        cluster.change(rank, node=f"node-{rank}", waiting="ImagePullBackOff: Back-off pulling image wrong")
    cluster.settle()
    cluster.edit(podTemplate=IMAGE)
    cluster.step()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as) == (Reason.SPEC_EDITED, None)
    cluster.tick(3)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    images = [cluster.manifests[name]["spec"]["containers"][0]["image"] for name in cluster.pods]
    assert images == ["registry.example/trainer:fixed"] * 2
    assert (cluster.job.status.failures, cluster.job.status.preemptions) == (0, 0)


def test_edit_does_not_interrupt_a_running_gang_and_the_status_says_so() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    cluster.edit(podTemplate=IMAGE)
    cluster.settle()
    status = cluster.job.status
    assert (status.attempt, status.phase) == (1, Phase.RUNNING)
    outdated = find(status, ConditionType.PODS_OUTDATED)
    assert outdated is not None
    assert (outdated.status, outdated.reason) == ("True", Reason.SPEC_EDITED)
    assert "set spec.suspend to true" in outdated.message
    assert cluster.reasons().count("SpecEdited") == 1
    # The advice works.
    cluster.edit(podTemplate=IMAGE, suspend=True)
    cluster.settle()
    cluster.tick(200)
    cluster.settle()
    cluster.edit(podTemplate=IMAGE)
    cluster.running()
    assert cluster.job.status.attempt == 2
    assert not is_true(cluster.job.status, ConditionType.PODS_OUTDATED)


@pytest.mark.parametrize("field", EDITS)
def test_every_field_of_new_pods_is_in_the_hash(field: str) -> None:
    assert hash_template(make_job(**EDITS[field]).spec) != hash_template(make_job().spec)


def test_hash_covers_exactly_the_fields_that_change_with_the_next_attempt() -> None:
    assert set(EDITS) == {path for path, when in CHANGEABLE.items() if when == NEXT_ATTEMPT}


@pytest.mark.parametrize(
    "edit", [{"suspend": False}, {"recovery": {"maxFailures": 9}}, {"ttlSecondsAfterFinished": 1}], ids=str
)
def test_edit_of_another_field_changes_no_pod(edit: dict[str, Any]) -> None:
    cluster = FakeCluster()
    cluster.settle()
    cluster.edit(**edit)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    assert find(cluster.job.status, ConditionType.PODS_OUTDATED) is None


def test_refused_edit_does_not_end_the_attempt() -> None:
    cluster = FakeCluster()
    cluster.settle()
    cluster.edit(podTemplate={"specs": {}})
    cluster.settle()
    assert cluster.job.status.reason == Reason.WAITING_FOR_PODS
    assert not is_true(cluster.job.status, ConditionType.ACCEPTED)
    assert cluster.job.status.attempts[0].reason is None


def test_recovery_in_place_keeps_no_pod_from_before_an_edit() -> None:
    """An edit that raises the memory reaches all pods, not only the one that ran out of it."""
    cluster = fixed_cluster()
    assert cluster.settings is HOLDING
    topology = {"accelerator": "cpu", "nodes": 3, "resources": {"memory": "8Gi"}}
    cluster.edit(topology=topology)
    cluster.settle()
    cluster.vanish("circles-a1-n1")
    cluster.settle()
    cluster.tick(3)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    assert sorted(cluster.pods) == [f"circles-a2-n{rank}" for rank in range(3)]


def test_pods_of_an_older_operator_are_not_outdated() -> None:
    cluster = FakeCluster()
    cluster.settle()
    for rank in (0, 1):
        cluster.change(rank, template=None)
    cluster.edit(podTemplate=IMAGE)
    cluster.settle()
    assert cluster.job.status.attempt == 1
