"""A job with a queue: its request, admission, eviction, growth and end, with Kueue's decisions made by the test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Order, RankState
from finetune_contract.phase import Phase
from finetune_operator.api import kueue, labels
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.cluster.observe_workload import Flavor
from finetune_operator.plan.model.conditions import find
from testing.simulated.workloads import is_reserved, is_true
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job, seconds
from tests.plan.scenarios import ELASTIC, HOLDING, place, send_heartbeats, wait_for_peers

QUEUED = replace(SETTINGS, kueue=True, kueue_priority_boost=True)
NAME = "circles-1f0c3a2b"


def queued(settings: Any = QUEUED, **spec: Any) -> FakeCluster:
    """Return a job that has requested its pods from the queue `gpus`."""
    cluster = FakeCluster(make_job(queueName="gpus", **spec), settings=settings)
    cluster.settle()
    return cluster


def admitted(settings: Any = QUEUED, **spec: Any) -> FakeCluster:
    """Return a job whose first attempt trains."""
    cluster = queued(settings, **spec)
    cluster.queue.admit(NAME, cluster.now)
    cluster.running()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    return cluster


def with_labels(job: FineTuneJob, **added: str) -> FineTuneJob:
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"labels": added})})


def test_no_pod_exists_before_the_admission() -> None:
    cluster = queued()
    assert (cluster.pods, cluster.job.status.attempt) == ({}, 0)
    workload = cluster.queue.stored[NAME]
    (pod_set,) = workload["spec"]["podSets"]
    assert (workload["spec"]["queueName"], pod_set["count"], "minCount" in pod_set) == ("gpus", 2, False)
    assert workload["metadata"]["ownerReferences"][0]["uid"] == cluster.job.metadata.uid
    assert cluster.job.status.phase is Phase.QUEUED
    cluster.queue.explain(NAME, cluster.now, "Pending", "insufficient unused quota for cpu")
    cluster.settle()
    assert cluster.job.status.reason == Reason.QUEUED
    assert cluster.job.status.message == "queue gpus: Pending: insufficient unused quota for cpu"
    cluster.queue.admit(NAME, cluster.now)
    cluster.settle()
    assert sorted(cluster.pods) == ["circles-a1-n0", "circles-a1-n1"]


def test_pods_run_on_the_nodes_of_the_assigned_flavor() -> None:
    """Kueue has reserved the quota of these nodes, so its selector replaces that of the template."""
    toleration = {"key": "spot", "operator": "Exists"}
    template = {"spec": {"nodeSelector": {"pool": "any", "disk": "ssd"}, "tolerations": [{"key": "own"}]}}
    cluster = queued(podTemplate=template)
    cluster.queue.admit(NAME, cluster.now, flavor="spot")
    cluster.settle()
    assert cluster.pods == {}, "the flavor is not known yet"
    assert cluster.job.status.phase is Phase.QUEUED
    cluster.flavors["spot"] = Flavor({"pool": "spot"}, (toleration,))
    cluster.settle()
    spec = cluster.manifests["circles-a1-n0"]["spec"]
    assert spec["nodeSelector"] == {"pool": "spot", "disk": "ssd"}
    assert spec["tolerations"] == [{"key": "own"}, toleration]


def test_admission_checks_change_the_pods() -> None:
    cluster = queued()
    workload = cluster.queue.admit(NAME, cluster.now)
    update = {"name": "main", "labels": {"a": "1"}, "annotations": {"b": "2"}, "nodeSelector": {"c": "3"}}
    workload["status"]["admissionChecks"] = [{"name": "prov", "podSetUpdates": [update, {"name": "other"}]}]
    cluster.settle()
    pod = cluster.manifests["circles-a1-n0"]
    assert pod["metadata"]["labels"]["a"] == "1"
    assert (pod["metadata"]["annotations"], pod["spec"]["nodeSelector"]) == ({"b": "2"}, {"c": "3"})


def test_pods_that_kueue_places_by_topology_wait_for_their_place() -> None:
    cluster = queued()
    workload = cluster.queue.admit(NAME, cluster.now)
    workload["status"]["admission"]["podSetAssignments"][0]["topologyAssignment"] = {"levels": ["rack"]}
    cluster.settle()
    pod = cluster.manifests["circles-a1-n1"]
    assert pod["spec"]["schedulingGates"] == [{"name": kueue.TOPOLOGY_GATE}]
    # Kueue ignores pods without an annotation of its topologies.
    unconstrained = {f"{kueue.GROUP}/podset-unconstrained-topology": "true"}
    assert pod["metadata"]["annotations"] == {kueue.POD_WORKLOAD: NAME} | unconstrained
    assert pod["metadata"]["labels"][kueue.POD_SET_LABEL] == "main"


def test_an_evicted_job_saves_before_it_yields() -> None:
    """The eviction counts as a preemption; the pods have their own grace period, and the quota is released last."""
    cluster = admitted()
    cluster.queue.evict(NAME, cluster.now, message="for job two")
    cluster.step()
    entry = cluster.job.status.attempts[-1]
    assert (entry.reason, entry.counts_as) == (Reason.EVICTED_BY_QUEUE, CountsAs.PREEMPTION)
    assert entry.message == "Preempted: for job two"
    assert (cluster.job.status.preemptions, cluster.job.status.failures) == (1, 0)
    assert {pod.grace for pod in cluster.pods.values()} == {seconds(120)}, "the ranks have time to save"
    for received in cluster.beats.values():
        assert cluster.reply(received.beat).order is Order.SAVE_AND_STOP
    cluster.settle()
    assert is_reserved(cluster.queue.stored[NAME]), "pods still use the quota"
    for rank in (0, 1):
        cluster.exit(rank, ExitCode.SAVED)
    cluster.tick(120)
    cluster.settle()
    workload = cluster.queue.stored[NAME]
    assert not is_reserved(workload)
    assert not is_true(workload, "QuotaReserved")
    assert not is_true(workload, "Admitted")
    assert is_true(workload, "Requeued")
    assert cluster.job.status.phase is Phase.QUEUED
    cluster.queue.admit(NAME, cluster.now)
    cluster.running()
    assert cluster.job.status.attempt == 2


def test_pods_that_are_kept_between_two_attempts_yield_after_an_eviction() -> None:
    """Kueue waits until no pod is left, and the next attempt waits for Kueue."""
    cluster = admitted(settings=replace(HOLDING, kueue=True))
    cluster.exit(1, ExitCode.SOFTWARE)
    cluster.step()
    wait_for_peers(cluster, 0)
    cluster.step()
    assert cluster.job.status.attempts[-1].reason == Reason.PROCESS_FAILED
    assert "circles-a1-n0" in cluster.pods, "it is kept during the back-off"
    cluster.queue.evict(NAME, cluster.now, message="for job two")
    for _ in range(60):
        if cluster.pods:
            wait_for_peers(cluster, *(pod.node_rank for pod in cluster.pods.values()))
        cluster.settle()
        cluster.tick(1)
    assert cluster.pods == {}
    assert not is_reserved(cluster.queue.stored[NAME])
    assert cluster.job.status.phase is Phase.QUEUED
    cluster.queue.admit(NAME, cluster.now)
    cluster.running()
    assert cluster.job.status.attempt == 2


@pytest.mark.parametrize(("reason", "again"), [("Preempted", True), ("NodeFailures", True), ("AdmissionCheck", False)])
def test_kueue_decides_when_an_evicted_job_is_queued_again(reason: str, again: bool) -> None:
    cluster = admitted()
    cluster.queue.evict(NAME, cluster.now, reason)
    cluster.settle()
    cluster.tick(120)
    cluster.settle()
    assert is_true(cluster.queue.stored[NAME], "Requeued") is again


def test_the_time_in_the_queue_after_an_eviction_does_not_count_towards_the_deadline() -> None:
    cluster = admitted(activeDeadlineSeconds=600)
    cluster.queue.evict(NAME, cluster.now)
    cluster.settle()
    cluster.tick(120)
    cluster.settle()
    cluster.tick(5000)
    cluster.settle()
    assert cluster.job.status.phase is Phase.QUEUED
    cluster.queue.admit(NAME, cluster.now)
    cluster.running()
    assert cluster.job.status.attempt == 2
    assert cluster.job.status.tally.suspended_seconds == pytest.approx(5120)
    cluster.tick(601)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == (Phase.FAILED, Reason.DEADLINE_EXCEEDED)


def test_a_deleted_request_ends_the_attempt_and_is_repeated() -> None:
    cluster = admitted()
    cluster.queue.stored.clear()
    cluster.settle()
    assert cluster.job.status.attempts[-1].message == "its Workload was deleted"
    assert NAME in cluster.queue.stored
    assert all(pod.deleted_at is not None for pod in cluster.pods.values())


def test_a_deactivated_job_names_the_remedy() -> None:
    cluster = queued()
    cluster.queue.stored[NAME]["spec"]["active"] = False
    cluster.settle()
    assert "set its spec.active to true" in (cluster.job.status.message or "")


def test_a_finished_job_ends_its_request_when_no_pod_uses_a_node() -> None:
    cluster = admitted()
    cluster.train_to(100)
    for rank in (0, 1):
        cluster.beat(rank, RankState.DONE, step=100)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert not is_true(cluster.queue.stored[NAME], "Finished")
    cluster.exit(0, 0)
    cluster.exit(1, 0)
    cluster.settle()
    finished = [each for each in cluster.queue.stored[NAME]["status"]["conditions"] if each["type"] == "Finished"]
    assert [(each["status"], each["reason"]) for each in finished] == [("True", "Succeeded")]


def test_a_suspended_job_leaves_the_queue_and_requests_its_pods_again() -> None:
    cluster = admitted()
    cluster.edit(queueName="gpus", suspend=True)
    cluster.settle()
    assert NAME in cluster.queue.stored, "its pods are still saving"
    cluster.tick(120)
    cluster.settle()
    assert cluster.queue.stored == {}
    cluster.edit(queueName="gpus", suspend=False)
    cluster.settle()
    assert (NAME in cluster.queue.stored, cluster.pods) == (True, {})


def test_an_edit_changes_a_waiting_request_in_place() -> None:
    cluster = queued()
    uid = cluster.queue.stored[NAME]["metadata"]["uid"]
    cluster.edit(queueName="others", topology={"accelerator": "cpu", "nodes": 3})
    cluster.settle()
    workload = cluster.queue.stored[NAME]
    assert workload["metadata"]["uid"] == uid, "the job keeps its place in the queue"
    assert (workload["spec"]["queueName"], workload["spec"]["podSets"][0]["count"]) == ("others", 3)


def test_an_edit_of_a_running_job_requests_the_next_pods_again() -> None:
    """Quota was reserved for the old resources, so the next attempt needs another admission."""
    cluster = admitted()
    resources = {"accelerator": "cpu", "nodes": 2, "resources": {"cpu": "4"}}
    cluster.edit(queueName="gpus", topology=resources)
    cluster.settle()
    assert len(cluster.pods) == 2
    uid = cluster.queue.stored[NAME]["metadata"]["uid"]
    cluster.vanish("circles-a1-n0")
    cluster.settle()
    cluster.tick(5)
    cluster.settle()
    assert cluster.queue.stored[NAME]["metadata"]["uid"] != uid
    assert (cluster.pods, cluster.job.status.phase) == ({}, Phase.QUEUED)
    cluster.queue.admit(NAME, cluster.now)
    cluster.running()
    assert cluster.manifests["circles-a2-n0"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "4"


def test_an_elastic_job_starts_with_the_admitted_pods_and_requests_the_others() -> None:
    cluster = FakeCluster(make_job(queueName="gpus", topology=ELASTIC), settings=replace(HOLDING, kueue=True))
    cluster.settle()
    pod_set = cluster.queue.stored[NAME]["spec"]["podSets"][0]
    assert (pod_set["count"], pod_set["minCount"]) == (4, 2)
    cluster.queue.admit(NAME, cluster.now, count=3)
    cluster.settle()
    assert sorted(cluster.pods) == [f"circles-a1-n{rank}" for rank in range(3)]
    place(cluster, 0, 1, 2)
    send_heartbeats(cluster, step=5)
    cluster.settle()
    bigger = cluster.queue.stored[f"{NAME}-4"]
    assert bigger["metadata"]["annotations"][kueue.REPLACES] == f"default/{NAME}"
    assert "minCount" not in bigger["spec"]["podSets"][0]
    assert len(cluster.pods) == 3, "no standby pod exists before its admission"
    cluster.queue.admit(f"{NAME}-4", cluster.now)
    cluster.queue.finish(NAME, cluster.now, "WorkloadSliceReplaced")
    cluster.settle()
    assert "circles-a1-n3" in cluster.pods
    place(cluster, 3)
    cluster.tick(70)
    send_heartbeats(cluster, step=50)
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason == Reason.GROWN


def test_a_job_that_multikueue_has_copied_keeps_its_only_request() -> None:
    """MultiKueue follows one Workload: when another one replaces it, MultiKueue ends the job."""
    job = with_labels(make_job(queueName="gpus", topology=ELASTIC), **{kueue.PREBUILT_LABEL: "given"})
    cluster = FakeCluster(job, settings=replace(HOLDING, kueue=True))
    source = FakeCluster(make_job(queueName="gpus", topology=ELASTIC), settings=replace(HOLDING, kueue=True))
    source.settle()
    meta = source.queue.stored[NAME]["metadata"]
    given = {"name": "given", "labels": meta["labels"], "annotations": meta["annotations"]}
    cluster.queue.create({**source.queue.stored[NAME], "metadata": given}, cluster.now)
    cluster.settle()
    cluster.queue.admit("given", cluster.now, count=3)
    cluster.settle()
    place(cluster, 0, 1, 2)
    send_heartbeats(cluster, step=5)
    cluster.settle()
    assert cluster.job.status.attempts[-1].training_at is not None
    assert list(cluster.queue.stored) == ["given"]
    # The manager cluster copies the status of that job.
    manager = FakeCluster(
        make_job(queueName="gpus", topology=ELASTIC, managedBy=kueue.MULTIKUEUE), settings=replace(HOLDING, kueue=True)
    )
    manager.settle()
    manager.queue.admit(NAME, manager.now, count=3)
    manager.job = manager.job.model_copy(update={"status": cluster.job.status})
    manager.settle()
    assert list(manager.queue.stored) == [NAME]


def test_an_evicted_replacement_may_continue_with_fewer_pods_again() -> None:
    cluster = FakeCluster(make_job(queueName="gpus", topology=ELASTIC), settings=replace(HOLDING, kueue=True))
    cluster.settle()
    cluster.queue.admit(NAME, cluster.now, count=2)
    cluster.settle()
    place(cluster, 0, 1)
    send_heartbeats(cluster, step=5)
    cluster.settle()
    cluster.queue.admit(f"{NAME}-4", cluster.now)
    cluster.settle()
    assert is_true(cluster.queue.stored[NAME], "Finished"), "an older Kueue does not finish what it replaces"
    cluster.queue.evict(f"{NAME}-4", cluster.now)
    cluster.settle()
    cluster.tick(120)
    cluster.settle()
    (workload,) = cluster.queue.stored.values()
    assert workload["spec"]["podSets"][0]["minCount"] == 2


def test_the_label_of_kueue_requests_a_queue_too() -> None:
    job = with_labels(make_job(), **{kueue.QUEUE_LABEL: "pictures"})
    cluster = FakeCluster(job, settings=QUEUED)
    cluster.settle()
    assert cluster.queue.stored[NAME]["spec"]["queueName"] == "pictures"
    assert cluster.pods == {}


def test_two_different_queues_are_refused() -> None:
    job = with_labels(make_job(queueName="gpus"), **{kueue.QUEUE_LABEL: "pictures"})
    cluster = FakeCluster(job, settings=QUEUED)
    cluster.settle()
    accepted = find(cluster.job.status, ConditionType.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("False", Reason.INVALID_SPEC)
    assert "leave one of them out" in accepted.message


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("by_label", [False, True])
def test_a_queue_without_kueue_is_refused_at_once(enabled: bool, by_label: bool) -> None:
    job = with_labels(make_job(), **{kueue.QUEUE_LABEL: "q"}) if by_label else make_job(queueName="q")
    cluster = FakeCluster(job, settings=replace(SETTINGS, kueue=enabled), queues_served=False)
    cluster.settle()
    accepted = find(cluster.job.status, ConditionType.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("False", Reason.NOT_SUPPORTED)
    assert ("install Kueue" if enabled else "kueue.enabled") in accepted.message
    assert (cluster.pods, cluster.queue.stored) == ({}, {})
    cluster.queues_served, cluster.settings = True, QUEUED
    cluster.settle()
    assert NAME in cluster.queue.stored, "it is accepted once Kueue is installed"


def test_running_jobs_survive_the_removal_of_kueue() -> None:
    cluster = admitted()
    cluster.queue.stored.clear()
    cluster.queues_served = False
    cluster.settle()
    assert cluster.job.status.attempts[-1].ended_at is None


def test_no_pod_starts_without_admission_after_queues_were_disabled() -> None:
    cluster = queued()
    cluster.settings = replace(QUEUED, kueue=False)
    cluster.settle()
    assert (cluster.pods, cluster.job.status.phase) == ({}, Phase.QUEUED)
    assert "kueue.enabled" in (cluster.job.status.message or "")


def test_a_given_request_is_never_outdated() -> None:
    """Another version of the operator in the manager cluster may have created it."""
    cluster = queued()
    cluster.job = with_labels(cluster.job, **{kueue.PREBUILT_LABEL: NAME})
    cluster.queue.stored[NAME]["metadata"]["annotations"][labels.REQUEST] = "other"
    cluster.queue.admit(NAME, cluster.now)
    cluster.settle()
    assert len(cluster.pods) == 2


def test_multikueue_gets_a_request_and_nothing_else() -> None:
    cluster = FakeCluster(make_job(queueName="gpus", managedBy=kueue.MULTIKUEUE), settings=QUEUED)
    before = cluster.job.status
    cluster.settle()
    assert (list(cluster.queue.stored), cluster.pods, cluster.configs) == ([NAME], {}, set())
    assert cluster.job.status == before, "Kueue copies the status of the other cluster"
    cluster.queue.admit(NAME, cluster.now)
    cluster.settle()
    assert cluster.pods == {}


def test_the_cluster_that_multikueue_chose_uses_the_given_request() -> None:
    job = with_labels(make_job(queueName="gpus"), **{kueue.PREBUILT_LABEL: "given"})
    cluster = FakeCluster(job, settings=QUEUED)
    cluster.settle()
    assert cluster.queue.stored == {}
    source = FakeCluster(make_job(queueName="gpus"), settings=QUEUED)
    source.settle()
    manifest = source.queue.stored[NAME]
    meta = {"name": "given", "labels": manifest["metadata"]["labels"]}
    cluster.queue.create({**manifest, "metadata": meta}, cluster.now)
    cluster.settle()
    assert cluster.queue.stored["given"]["metadata"]["ownerReferences"][0]["uid"] == job.metadata.uid
    cluster.queue.admit("given", cluster.now)
    cluster.settle()
    assert len(cluster.pods) == 2
    assert list(cluster.queue.stored) == ["given"]
