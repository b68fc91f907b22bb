"""FineTuneJobs on a real API server and kwok nodes, looked after by the operator with the chart's role."""

from __future__ import annotations

from typing import Any

import pytest

from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, OperatorProcess, build_job, running
from tests.operator.conftest import NewOperator

pytestmark = pytest.mark.cluster


def finish(jobs: Jobs, name: str, code: int) -> None:
    """Let a pod's container end, as a kubelet would tell it."""
    phase = "Succeeded" if code == 0 else "Failed"
    state = {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:00:00Z"}}
    jobs.set_pod_status(name, {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]})


def no_pods(jobs: Jobs) -> bool:
    return not jobs.pods()


def test_from_the_first_pod_to_success(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        uid = jobs.create(build_job("circles"))["metadata"]["uid"]
        status = jobs.wait_phase("circles", "Running")
        assert status["nodes"] == "2/2"
        assert sorted(jobs.pods()) == ["circles-a1-n0", "circles-a1-n1"]
        for pod in jobs.pods().values():
            (owner,) = pod["metadata"]["ownerReferences"]
            assert (owner["uid"], owner["controller"]) == (uid, True)
            finish(jobs, pod["metadata"]["name"], 0)
        status = jobs.wait_phase("circles", "Succeeded")
        assert status["attempt"] == 1
        assert "finalizers" not in jobs.get("circles")["metadata"]
        assert not jobs.get("circles")["metadata"].get("annotations")


def test_a_deleted_pod_costs_an_attempt_and_spends_no_failure(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        jobs.delete_pod("circles-a1-n1")
        status = jobs.wait_attempt("circles", 2)
        assert (status["preemptions"], status["failures"]) == (1, 0)
        assert sorted(jobs.pods()) == ["circles-a2-n0", "circles-a2-n1"]
        first = status["attempts"][0]
        assert (first["countsAs"], first["rank"], first["pod"]) == ("Preemption", 1, "circles-a1-n1")
        reasons = [event["reason"] for event in jobs.events("circles")]
        assert reasons.count("AttemptStarted") == 2


def test_failures_end_the_job_with_their_cause(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles", nodes=1, recovery={"maxFailures": 0}))
        jobs.wait_phase("circles", "Running")
        finish(jobs, "circles-a1-n0", 70)
        status = jobs.wait_phase("circles", "Failed")
        assert (status["reason"], status["failures"]) == ("MaxFailuresExceeded", 1)
        assert status["attempts"][0]["exitCode"] == 70


def test_suspend_gives_the_machines_back_and_resume_goes_on(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        jobs.patch("circles", {"spec": {"suspend": True}})
        jobs.wait_phase("circles", "Suspended")
        assert no_pods(jobs)
        jobs.patch("circles", {"spec": {"suspend": False}})
        status = jobs.wait_attempt("circles", 2)
        assert (status["preemptions"], status["failures"]) == (0, 0)


def test_a_deadline_and_a_time_to_live(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles", activeDeadlineSeconds=2, ttlSecondsAfterFinished=1))
        wait_for("the job is over and gone", lambda: not listed(jobs), 30)
        wait_for("so is all of it", lambda: no_pods(jobs), 30)
        reasons = {event["reason"] for event in jobs.events("circles")}
        assert "DeadlineExceeded" in reasons


def listed(jobs: Jobs) -> list[Any]:
    path = f"/apis/finetune-operator.io/v1alpha1/namespaces/{jobs.namespace}/finetunejobs"
    items: list[Any] = jobs.control_plane.api.get(path)["items"]
    return items


def test_deletion_needs_no_operator(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
    jobs.delete("circles")
    wait_for("all of it is gone", lambda: no_pods(jobs) and not listed(jobs), 30)


def test_a_job_of_the_same_name_starts_anew(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        before = jobs.pods()
        # They end when the test says: kwok deletes a pod twice and by its name only, so that its second call may meet
        # the pod that took the name.
        nodes = {pod["spec"]["nodeName"] for pod in before.values()}
        for node in nodes:
            jobs.control_plane.neglect_node(node)
        jobs.delete("circles")
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Starting")
        # The garbage collector learns of new kinds, as of ours, every half a minute.
        wait_for("the old pods are being deleted", lambda: all(map(is_terminating, jobs.pods().values())), 90)
        assert uids(jobs.pods()) == uids(before)
        for name in before:
            jobs.delete_pod(name)
        for node in nodes:
            jobs.control_plane.recover_node(node)
        assert jobs.wait_phase("circles", "Running")["attempt"] == 1
        assert sorted(jobs.pods()) == sorted(before)
        assert not uids(before) & uids(jobs.pods())


def is_terminating(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def uids(pods: dict[str, dict[str, Any]]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods.values()}


def test_jobs_of_another_controller_are_left_alone(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        job = build_job("theirs")
        job["spec"]["managedBy"] = "kueue.x-k8s.io/multikueue"
        jobs.create(job)
        jobs.create(build_job("ours"))
        jobs.wait_phase("ours", "Running")
        assert jobs.status("theirs") == {}


def test_several_namespaces_and_no_other(jobs: Jobs, new_operator: NewOperator) -> None:
    cluster = jobs.control_plane
    second, foreign = (Jobs(cluster, cluster.create_namespace(f"{jobs.namespace}-{name}")) for name in ("too", "not"))
    with running(new_operator(f"--namespaces={jobs.namespace},{second.namespace}")):
        for one in (foreign, jobs, second):
            one.create(build_job("circles"))
        for one in (jobs, second):
            one.wait_phase("circles", "Running")
            one.delete_pod("circles-a1-n0")
            one.wait_attempt("circles", 2)
        assert foreign.status("circles") == {}


def test_a_node_that_vanishes_takes_its_pods_with_it(jobs: Jobs, new_operator: NewOperator) -> None:
    """Its pod hangs in its deletion for ever; the next attempt does not wait for it."""
    cluster = jobs.control_plane
    cluster.add_nodes(2, prefix="spare", labels={"test": "lost"})
    template = {"spec": {"nodeSelector": {"test": "lost"}, "terminationGracePeriodSeconds": 1}}
    with running(new_operator()):
        jobs.create(build_job("circles", nodes=1, podTemplate=template))
        jobs.wait_phase("circles", "Running")
        node = jobs.pods()["circles-a1-n0"]["spec"]["nodeName"]
        cluster.lose_node(node)
        status = jobs.wait_attempt("circles", 2)
        assert status["attempts"][0]["reason"] in ("NodeLost", "DeletionByTaintManager")
        assert (status["preemptions"], status["failures"]) == (1, 0)
        assert jobs.pods()["circles-a2-n0"]["spec"]["nodeName"] != node
        cluster.recover_node(node)


def test_a_taint_of_a_termination_handler_is_a_notice(jobs: Jobs, new_operator: NewOperator) -> None:
    cluster = jobs.control_plane
    (node,) = cluster.add_nodes(1, prefix="spot", labels={"test": "spot"})
    with running(new_operator()):
        template = {"spec": {"nodeSelector": {"test": "spot"}}}
        jobs.create(build_job("circles", nodes=1, podTemplate=template, recovery={"noticeSeconds": 1}))
        jobs.wait_phase("circles", "Running")
        taint = {"key": "aws-node-termination-handler/spot-itn", "effect": "NoSchedule"}
        cluster.api.patch(f"/api/v1/nodes/{node}", {"spec": {"taints": [taint]}})
        wait_for("the attempt ends", lambda: jobs.status("circles").get("preemptions") == 1)
        assert jobs.status("circles")["attempts"][0]["reason"] == "Preempted"


def test_without_watching_nodes_a_lost_one_is_seen_by_its_pods(jobs: Jobs, new_operator: NewOperator) -> None:
    cluster = jobs.control_plane
    (node,) = cluster.add_nodes(1, prefix="unwatched", labels={"test": "unwatched"})
    template = {"spec": {"nodeSelector": {"test": "unwatched"}}}
    with running(new_operator("--watch-nodes=false")):
        jobs.create(build_job("circles", nodes=1, podTemplate=template, recovery={"noticeSeconds": 1}))
        jobs.wait_phase("circles", "Running")
        cluster.lose_node(node)
        wait_for("the attempt ends", lambda: jobs.status("circles").get("preemptions") == 1)
        assert jobs.status("circles")["attempts"][0]["reason"] == "DeletionByTaintManager"
        cluster.recover_node(node)


NO_FIELD = "spec.podTemplate.spec.nodeSelektor: a pod has no field nodeSelektor; write nodeSelector, or leave it out"
NO_POD = "spec.podTemplate: the cluster takes no such pod: "


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ({"spec": {"nodeSelektor": {"disk": "fast"}}}, NO_FIELD),
        ({"spec": {"tolerations": [{"operator": "Perhaps"}]}}, NO_POD),
        ({"spec": {"terminationGracePeriodSeconds": "long"}}, NO_POD),
    ],
)
def test_a_template_that_makes_no_pod_is_not_accepted_until_it_is_mended(
    jobs: Jobs, new_operator: NewOperator, template: dict[str, Any], sentence: str
) -> None:
    heir = new_operator()
    with running(new_operator()):
        jobs.create(build_job("circles", podTemplate=template))
        status = wait_for("it is refused", lambda: refused(jobs)) or {}
        assert status["message"].startswith(sentence)
        assert (status["phase"], status["reason"]) == ("Pending", "FailedCreate")
        assert not jobs.pods()
    # What the cluster said is not forgotten with the operator that heard it.
    version = jobs.get("circles")["metadata"]["resourceVersion"]
    with running(heir) as operator:
        tried = 'finetune_api_requests_total{code="%s",method="POST",resource="pods"}'
        wait_for("it tries again", lambda: any(operator.metric(tried % code) >= 1 for code in (400, 422)))
        assert jobs.get("circles")["metadata"]["resourceVersion"] == version
        jobs.patch("circles", {"spec": {"podTemplate": None}})
        assert jobs.wait_phase("circles", "Running")["attempt"] == 1
        assert not refused(jobs)
        told = [event["reason"] for event in jobs.events("circles")]
        assert (told.count("FailedCreate"), told.count("AttemptStarted")) == (1, 1)


def refused(jobs: Jobs) -> dict[str, Any] | None:
    """The status of a job that is not accepted."""
    status = jobs.status("circles")
    accepted = [one["status"] for one in status.get("conditions", ()) if one["type"] == "Accepted"]
    return status if accepted == ["False"] else None


def test_a_name_that_is_taken_is_told(jobs: Jobs, new_operator: NewOperator) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "circles"}, "spec": {"clusterIP": "None"}}
    jobs.control_plane.api.create(f"/api/v1/namespaces/{jobs.namespace}/services", service)
    with running(new_operator()):
        jobs.create(build_job("circles"))
        wait_for("it is told", lambda: "NameTaken" in {event["reason"] for event in jobs.events("circles")})


def test_a_pod_that_the_cluster_refuses_is_told_and_tried_again(jobs: Jobs, new_operator: NewOperator) -> None:
    api, path = jobs.control_plane.api, f"/api/v1/namespaces/{jobs.namespace}/resourcequotas"
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    api.create(path, quota)
    wait_for("the quota counts", lambda: api.get(f"{path}/none").get("status", {}).get("used"))
    with running(new_operator()):
        jobs.create(build_job("circles"))
        wait_for("it is told", lambda: "FailedCreate" in {event["reason"] for event in jobs.events("circles")})
        status = jobs.wait_phase("circles", "Queued")
        assert status["reason"] == "FailedCreate"
        assert "exceeded quota: none" in status["message"]
        api.delete(f"{path}/none")
        status = jobs.wait_phase("circles", "Running", 60)
        assert status["attempt"] == 1


def test_nothing_is_written_while_nothing_changes(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        version = jobs.get("circles")["metadata"]["resourceVersion"]
        # Another job's whole start lies between the two looks.
        jobs.create(build_job("squares"))
        jobs.wait_phase("squares", "Running")
        assert jobs.get("circles")["metadata"]["resourceVersion"] == version
        assert writes(operator) <= 2 * 10


def writes(operator: OperatorProcess) -> float:
    """Writes so far, the lease's aside."""
    return sum(
        count
        for key, count in operator.metrics().items()
        if key.startswith("finetune_api_requests_total")
        and "GET" not in key
        and "WATCH" not in key
        and "lease" not in key
    )
