"""The control plane of the tests: properties of the real API server that other tests depend on."""

from __future__ import annotations

from typing import Any

import pytest

from testing.controlplane import nodes
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane, KubectlError

pytestmark = pytest.mark.cluster

OPERATOR = "finetune-operator"


@pytest.fixture(scope="module")
def node(control_plane: ControlPlane) -> str:
    """Return a node with GPUs that no other test uses."""
    labels = {"test": "control-plane"}
    return control_plane.add_nodes(1, prefix="bed", gpus=8, labels=labels)[0]


def build_pod(name: str, annotations: dict[str, str] | None = None, grace_seconds: int = 30) -> dict[str, Any]:
    container = {"name": "trainer", "image": "trainer:1", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations or {}},
        "spec": {
            "containers": [container],
            "nodeSelector": {"test": "control-plane"},
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": grace_seconds,
        },
    }


class Pods:
    """The pods of a namespace."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.api = control_plane.api
        self.path = f"/api/v1/namespaces/{namespace}/pods"

    def run(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Create a pod and wait until it runs."""
        name = pod["metadata"]["name"]
        self.api.create(self.path, pod)
        wait_for(f"pod {name} runs", lambda: self.phase(name) == "Running")
        return self.get(name)

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"{self.path}/{name}")
        return found

    def phase(self, name: str) -> str:
        return str(self.get(name)["status"]["phase"])

    def deleted(self, name: str) -> bool:
        try:
            self.get(name)
        except ControlPlaneApiError as error:
            return error.code == 404
        return False


@pytest.fixture
def pods(control_plane: ControlPlane, namespace: str, node: str) -> Pods:
    return Pods(control_plane, namespace)


def test_pod_runs_on_a_kwok_node_and_disappears_when_it_is_deleted(pods: Pods, node: str) -> None:
    pod = pods.run(build_pod("trainer"))
    assert pod["spec"]["nodeName"] == node
    assert pod["status"]["podIP"].startswith("10.244.")
    assert pod["status"]["containerStatuses"][0]["ready"]
    pods.api.delete(f"{pods.path}/trainer")
    wait_for("the pod is deleted", lambda: pods.deleted("trainer"))


def test_pod_that_requests_too_many_gpus_stays_pending_with_a_reason(pods: Pods) -> None:
    pod = build_pod("greedy")
    pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "9"
    pods.api.create(pods.path, pod)

    def reason() -> str:
        conditions = pods.get("greedy")["status"].get("conditions", [])
        return next((condition.get("message", "") for condition in conditions), "")

    assert "Insufficient nvidia.com/gpu" in wait_for("the scheduler reports the reason", reason)


def test_status_written_by_a_test_is_kept(pods: Pods) -> None:
    pods.run(build_pod("trainer"))
    terminated = {"exitCode": 42, "reason": "Error", "message": "loss is NaN"}
    status = {
        "phase": "Failed",
        "containerStatuses": [
            {
                "name": "trainer",
                "image": "trainer:1",
                "imageID": "",
                "ready": False,
                "restartCount": 0,
                "state": {"terminated": terminated},
            }
        ],
    }
    pods.api.patch(f"{pods.path}/trainer/status", {"status": status})
    # kwok receives this change too, so it would have reset the pod by now.
    pods.api.patch(f"{pods.path}/trainer", {"metadata": {"labels": {"seen": "true"}}})
    pods.run(build_pod("another"))
    assert pods.phase("trainer") == "Failed"
    pods.api.delete(f"{pods.path}/trainer")
    wait_for("a pod that has ended is deleted at once", lambda: pods.deleted("trainer"))


def test_pod_may_take_its_grace_period_to_end(pods: Pods) -> None:
    pods.run(build_pod("slow", {nodes.STOP_SECONDS: "3600", nodes.EXIT_CODE: "0"}, grace_seconds=3600))
    pods.api.delete(f"{pods.path}/slow")
    assert "deletionTimestamp" in pods.get("slow")["metadata"]
    # The grace period may be shortened, as `kubectl delete --grace-period` does.
    pods.api.delete(f"{pods.path}/slow", grace_period_seconds=1)
    wait_for("the grace period is over", lambda: pods.deleted("slow"))


def test_held_pod_is_controlled_by_the_test(pods: Pods, node: str) -> None:
    pods.api.create(pods.path, build_pod("held", {nodes.HOLD: "true"}))
    pods.run(build_pod("another"))
    wait_for("it is scheduled", lambda: pods.get("held")["spec"].get("nodeName") == node)
    assert pods.phase("held") == "Pending"
    pods.api.delete(f"{pods.path}/held", grace_period_seconds=0)
    assert pods.deleted("held")


def test_lost_node_is_tainted_and_its_pods_hang_until_it_recovers(control_plane: ControlPlane, pods: Pods) -> None:
    name = control_plane.add_nodes(1, prefix="lost", gpus=8, labels={"test": "lost"})[0]
    pod = build_pod("trainer")
    pod["spec"]["nodeSelector"] = {"test": "lost"}
    pods.run(pod)
    control_plane.lose_node(name)

    def evicted() -> dict[str, Any]:
        found = pods.get("trainer")
        return found if "deletionTimestamp" in found["metadata"] else {}

    conditions = wait_for("the pod is evicted", evicted)["status"]["conditions"]
    reasons = [condition["reason"] for condition in conditions if condition["type"] == "DisruptionTarget"]
    assert reasons == ["DeletionByTaintManager"]
    control_plane.recover_node(name)
    wait_for("the pod is deleted", lambda: pods.deleted("trainer"))
    control_plane.delete_nodes([name])


def test_service_account_has_only_the_rights_of_its_role(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("create", "serviceaccount", OPERATOR, "-n", namespace)
    kubeconfig = control_plane.kubeconfig_for(OPERATOR, namespace)
    with pytest.raises(KubectlError, match='cannot list resource "pods"'):
        control_plane.kubectl("get", "pods", kubeconfig=kubeconfig)
    control_plane.kubectl("create", "role", "reader", "--verb=list", "--resource=pods", "-n", namespace)
    subject = f"--serviceaccount={namespace}:{OPERATOR}"
    control_plane.kubectl("create", "rolebinding", "reader", "--role=reader", subject, "-n", namespace)
    wait_for("the role is effective", lambda: _may_list(control_plane, namespace))
    assert control_plane.kubectl("get", "pods", kubeconfig=kubeconfig) == ""
    with pytest.raises(KubectlError, match='cannot delete resource "pods"'):
        control_plane.kubectl("delete", "pod", "trainer", kubeconfig=kubeconfig)
    verbs = {event["verb"] for event in control_plane.requests(f"system:serviceaccount:{namespace}:{OPERATOR}")}
    assert {"list", "delete"} <= verbs


def test_unauthenticated_request_is_in_the_audit_log(control_plane: ControlPlane, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/pods"
    with pytest.raises(ControlPlaneApiError) as caught:
        control_plane.api_with_token("an invalid token").get(path)
    assert caught.value.code == 401
    codes = [event["responseStatus"]["code"] for event in control_plane.requests() if event["requestURI"] == path]
    assert codes == [401]


def _may_list(control_plane: ControlPlane, namespace: str) -> bool:
    try:
        control_plane.api_for(OPERATOR, namespace).get(f"/api/v1/namespaces/{namespace}/pods")
    except ControlPlaneApiError as error:
        return error.code != 403
    return True


def test_token_review_returns_the_pod_and_refuses_another_audience(
    control_plane: ControlPlane, pods: Pods, namespace: str
) -> None:
    pod = pods.run(build_pod("trainer"))
    token = control_plane.token_for("default", namespace, audiences=["coordinator"], pod=pod)

    def review(audience: str) -> Any:
        spec = {"token": token, "audiences": [audience]}
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        return control_plane.api.create("/apis/authentication.k8s.io/v1/tokenreviews", request)["status"]

    accepted = review("coordinator")
    assert accepted["authenticated"]
    assert accepted["user"]["username"] == f"system:serviceaccount:{namespace}:default"
    assert accepted["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["trainer"]
    assert not review("another-audience").get("authenticated")


def test_deletion_of_an_owner_deletes_its_pods(pods: Pods, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    owner = pods.api.create(path, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}})
    pod = build_pod("child")
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
    pod["metadata"]["ownerReferences"] = [reference]
    pods.run(pod)
    pods.api.delete(f"{path}/owner")
    wait_for("the pod is deleted", lambda: pods.deleted("child"))


def test_restarted_api_server_has_all_its_data_and_clients_continue(control_plane: ControlPlane, pods: Pods) -> None:
    pods.run(build_pod("before"))
    control_plane.stop_api_server()
    with pytest.raises(OSError, match="refused"):
        pods.get("before")
    control_plane.start_api_server()
    assert pods.phase("before") == "Running"
    pods.run(build_pod("after"))


def test_expired_watch_is_answered_with_410(control_plane: ControlPlane, pods: Pods) -> None:
    version = pods.run(build_pod("trainer"))["metadata"]["resourceVersion"]
    pods.api.delete(f"{pods.path}/trainer", grace_period_seconds=0)
    control_plane.expire_watches()
    event = pods.api.get(f"{pods.path}?watch=1&resourceVersion={version}&timeoutSeconds=1")
    assert event["type"] == "ERROR"
    assert event["object"]["code"] == 410
