"""FineTuneJobs on a real API server with kwok nodes. The operator runs with the chart's role."""

from __future__ import annotations

from typing import Any

import pytest

from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, OperatorProcess, build_job, running
from tests.operator.conftest import NewOperator

pytestmark = pytest.mark.cluster


def finish(jobs: Jobs, name: str, code: int) -> None:
    """Set the status of a pod whose container has exited, as a kubelet would report it."""
    phase = "Succeeded" if code == 0 else "Failed"
    state = {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:00:00Z"}}
    jobs.set_pod_status(name, {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]})


def no_pods(jobs: Jobs) -> bool:
    return not jobs.pods()


def test_job_runs_and_succeeds(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        uid = jobs.create(build_job("circles"))["metadata"]["uid"]
        status = jobs.wait_phase("circles", "Running")
        assert status["nodes"] == "2/2"
        assert sorted(jobs.pods()) == ["circles-a1-n0", "circles-a1-n1"]
        for pod in jobs.pods().values():
            (owner,) = pod["metadata"]["ownerReferences"]
            assert (owner["uid"], owner["controller"]) == (uid, True)
            finish(jobs, pod["metadata"]["name"], 0)
        written = jobs.status("circles")["writes"]
        status = jobs.wait_phase("circles", "Succeeded")
        assert status["attempt"] == 1
        assert status["writes"] > written > 1
        assert "finalizers" not in jobs.get("circles")["metadata"]
        assert not jobs.get("circles")["metadata"].get("annotations")


def test_deleted_pod_starts_a_new_attempt_and_counts_no_failure(jobs: Jobs, new_operator: NewOperator) -> None:
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


def test_job_fails_with_the_cause_of_its_last_failure(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles", nodes=1, recovery={"maxFailures": 0}))
        jobs.wait_phase("circles", "Running")
        finish(jobs, "circles-a1-n0", 70)
        status = jobs.wait_phase("circles", "Failed")
        assert (status["reason"], status["failures"]) == ("MaxFailuresExceeded", 1)
        assert status["attempts"][0]["exitCode"] == 70


def test_suspend_deletes_the_pods_and_resume_continues(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        jobs.patch("circles", {"spec": {"suspend": True}})
        jobs.wait_phase("circles", "Suspended")
        assert no_pods(jobs)
        jobs.patch("circles", {"spec": {"suspend": False}})
        status = jobs.wait_attempt("circles", 2)
        assert (status["preemptions"], status["failures"]) == (0, 0)


def test_deadline_and_ttl(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles", activeDeadlineSeconds=2, ttlSecondsAfterFinished=1))
        wait_for("the job is deleted", lambda: not listed(jobs), 30)
        wait_for("its pods are deleted", lambda: no_pods(jobs), 30)
        reasons = {event["reason"] for event in jobs.events("circles")}
        assert "DeadlineExceeded" in reasons


def listed(jobs: Jobs) -> list[Any]:
    path = f"/apis/finetune-operator.io/v1alpha1/namespaces/{jobs.namespace}/finetunejobs"
    items: list[Any] = jobs.control_plane.api.get(path)["items"]
    return items


def test_deletion_works_without_the_operator(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
    jobs.delete("circles")
    wait_for("the job and its pods are deleted", lambda: no_pods(jobs) and not listed(jobs), 30)


def test_new_job_with_the_name_of_a_deleted_one_starts_over(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        before = jobs.pods()
        # The test ends the old pods itself: kwok deletes a pod twice and only by name, so its second call could delete
        # the new pod with the same name.
        nodes = {pod["spec"]["nodeName"] for pod in before.values()}
        for node in nodes:
            jobs.control_plane.hang_kubelet(node)
        jobs.delete("circles")
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Starting")
        # The garbage collector discovers new resource types, such as ours, only every half a minute.
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


def test_jobs_of_another_controller_are_ignored(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()):
        job = build_job("theirs")
        job["spec"]["managedBy"] = "kueue.x-k8s.io/multikueue"
        jobs.create(job)
        jobs.create(build_job("ours"))
        jobs.wait_phase("ours", "Running")
        assert jobs.status("theirs") == {}


def test_only_the_listed_namespaces_are_watched(jobs: Jobs, new_operator: NewOperator) -> None:
    cluster = jobs.control_plane
    second, foreign = (Jobs(cluster, cluster.create_namespace(f"{jobs.namespace}-{name}")) for name in ("too", "not"))
    with running(new_operator(f"--namespaces={jobs.namespace},{second.namespace}")):
        for each in (foreign, jobs, second):
            each.create(build_job("circles"))
        for each in (jobs, second):
            each.wait_phase("circles", "Running")
            each.delete_pod("circles-a1-n0")
            each.wait_attempt("circles", 2)
        assert foreign.status("circles") == {}


def test_pods_of_a_lost_node_are_replaced_on_another_node(jobs: Jobs, new_operator: NewOperator) -> None:
    """The deletion of the lost pod never completes; the next attempt does not wait for it."""
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


def test_taint_of_a_termination_handler_is_a_preemption_notice(jobs: Jobs, new_operator: NewOperator) -> None:
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


def test_lost_node_is_detected_by_its_pods_if_nodes_are_not_watched(jobs: Jobs, new_operator: NewOperator) -> None:
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


NO_FIELD = "spec.podTemplate.spec.nodeSelektor: a pod has no field nodeSelektor; write nodeSelector, or remove it"
NO_POD = "spec.podTemplate: the API server rejects the pod: "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"spec": {"nodeSelektor": {"disk": "fast"}}}, NO_FIELD),
        ({"spec": {"tolerations": [{"operator": "Perhaps"}]}}, NO_POD),
        ({"spec": {"terminationGracePeriodSeconds": "long"}}, NO_POD),
    ],
)
def test_invalid_pod_template_is_refused_until_it_is_corrected(
    jobs: Jobs, new_operator: NewOperator, template: dict[str, Any], message: str
) -> None:
    successor = new_operator()
    with running(new_operator()):
        jobs.create(build_job("circles", podTemplate=template))
        status = wait_for("it is refused", lambda: refused(jobs)) or {}
        assert status["message"].startswith(message)
        assert (status["phase"], status["reason"]) == ("Pending", "FailedCreate")
        assert not jobs.pods()
    # The refusal is not lost when the operator restarts.
    version = jobs.get("circles")["metadata"]["resourceVersion"]
    with running(successor) as operator:
        tried = 'finetune_api_requests_total{code="%s",method="POST",resource="pods"}'
        wait_for("the operator retries", lambda: any(operator.metric(tried % code) >= 1 for code in (400, 422)))
        assert jobs.get("circles")["metadata"]["resourceVersion"] == version
        jobs.patch("circles", {"spec": {"podTemplate": None}})
        assert jobs.wait_phase("circles", "Running")["attempt"] == 1
        assert not refused(jobs)
        reasons = [event["reason"] for event in jobs.events("circles")]
        assert (reasons.count("FailedCreate"), reasons.count("AttemptStarted")) == (1, 1)


def refused(jobs: Jobs) -> dict[str, Any] | None:
    """Return the status of a job that is not accepted; None if it is accepted."""
    status = jobs.status("circles")
    accepted = [item["status"] for item in status.get("conditions", ()) if item["type"] == "Accepted"]
    return status if accepted == ["False"] else None


def test_name_in_use_is_reported(jobs: Jobs, new_operator: NewOperator) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "circles"}, "spec": {"clusterIP": "None"}}
    jobs.control_plane.api.create(f"/api/v1/namespaces/{jobs.namespace}/services", service)
    with running(new_operator()):
        jobs.create(build_job("circles"))
        wait_for("an event reports it", lambda: "NameTaken" in {event["reason"] for event in jobs.events("circles")})


def test_pod_that_a_quota_refuses_is_reported_and_retried(jobs: Jobs, new_operator: NewOperator) -> None:
    api, path = jobs.control_plane.api, f"/api/v1/namespaces/{jobs.namespace}/resourcequotas"
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    api.create(path, quota)
    wait_for("the quota is active", lambda: api.get(f"{path}/none").get("status", {}).get("used"))
    with running(new_operator()):
        jobs.create(build_job("circles"))
        wait_for("an event reports it", lambda: "FailedCreate" in {event["reason"] for event in jobs.events("circles")})
        status = jobs.wait_phase("circles", "Queued")
        assert status["reason"] == "FailedCreate"
        assert "exceeded quota: none" in status["message"]
        api.delete(f"{path}/none")
        status = jobs.wait_phase("circles", "Running", 60)
        assert status["attempt"] == 1


def test_status_says_how_many_pods_a_quota_admits(jobs: Jobs, new_operator: NewOperator) -> None:
    api, path = jobs.control_plane.api, f"/api/v1/namespaces/{jobs.namespace}/resourcequotas"
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "one"}, "spec": {"hard": {"pods": "1"}}}
    api.create(path, quota)
    wait_for("the quota is active", lambda: api.get(f"{path}/one").get("status", {}).get("used"))
    with running(new_operator()):
        jobs.create(build_job("circles", topology={"accelerator": "cpu", "nodes": 2}))
        wait_for(
            "the message", lambda: "admits 1 of 2 pods" in (jobs.get("circles").get("status") or {}).get("message", "")
        )
        api.delete(f"{path}/one")
        jobs.wait_phase("circles", "Running", 60)


def test_default_limit_of_a_namespace_is_answered_with_topology_resources(
    jobs: Jobs, new_operator: NewOperator
) -> None:
    api, path = jobs.control_plane.api, f"/api/v1/namespaces/{jobs.namespace}/limitranges"
    limits = {"limits": [{"type": "Container", "default": {"cpu": "500m"}, "defaultRequest": {"cpu": "500m"}}]}
    api.create(path, {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "half"}, "spec": limits})
    with running(new_operator()):
        jobs.create(build_job("circles", topology={"accelerator": "cpu"}))
        wait_for("the refusal", lambda: jobs.status("circles").get("reason") == "FailedCreate")
        message = jobs.get("circles")["status"]["message"]
        assert "write what each pod needs in spec.topology.resources, e.g. cpu: 500m" in message
        # The advice works.
        jobs.patch("circles", {"spec": {"topology": {"resources": {"cpu": "500m"}}}})
        jobs.wait_phase("circles", "Running", 60)


def test_no_writes_while_nothing_changes(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator()) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        version = jobs.get("circles")["metadata"]["resourceVersion"]
        # Another job starts completely between the two checks.
        jobs.create(build_job("squares"))
        jobs.wait_phase("squares", "Running")
        assert jobs.get("circles")["metadata"]["resourceVersion"] == version
        assert writes(operator) <= 2 * 10


def writes(operator: OperatorProcess) -> float:
    """Return the number of writes so far, without those of the lease."""
    return sum(
        count
        for key, count in operator.metrics().items()
        if key.startswith("finetune_api_requests_total")
        and "GET" not in key
        and "WATCH" not in key
        and "lease" not in key
    )
