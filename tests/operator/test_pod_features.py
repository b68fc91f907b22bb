"""Newer fields of pods on a real API server, with exactly the role that the chart grants."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, build_job, granted, running
from testing.operator.heartbeats import HeartbeatClient, tls_context, tls_flags
from tests.operator.conftest import NewOperator
from tests.operator.test_in_place import GangSupervisors, all_run

pytestmark = pytest.mark.cluster

SECONDS = 120.0
NAMES = {"circles-a1-n0", "circles-a1-n1"}


def memory_of(jobs: Jobs) -> dict[str, Any]:
    resources = {name: pod["spec"]["containers"][0]["resources"] for name, pod in jobs.pods().items()}
    return {name: (each["requests"]["memory"], each["limits"]["memory"]) for name, each in resources.items()}


def report_resources(jobs: Jobs, name: str) -> None:
    """Report what a container has, as kubelets do that can resize it; kwok does not."""
    pod = jobs.pods()[name]
    (container,) = pod["spec"]["containers"]
    statuses = [{**each, "resources": container["resources"]} for each in pod["status"]["containerStatuses"]]
    jobs.set_pod_status(name, {"containerStatuses": statuses})


def growing(jobs: Jobs, gang: GangSupervisors) -> None:
    """Let a job of two pods train, then end its second pod as the kernel does."""
    topology = {"accelerator": "cpu", "nodes": 2, "resources": {"cpu": "1", "memory": "1Gi"}}
    jobs.create(build_job("circles", topology=topology, recovery={"maxMemory": "2Gi", "noticeSeconds": 1}))
    wait_for("the pods run", lambda: all_run(jobs, NAMES), SECONDS)
    for pod in sorted(NAMES):
        gang.join(pod, attempt=1)
    gang.report_step(40)
    jobs.wait_phase("circles", "Running", SECONDS)
    report_resources(jobs, "circles-a1-n0")
    state = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    container = {"name": "trainer", "image": "trainer", "imageID": "trainer", "ready": False, "restartCount": 0}
    jobs.set_pod_status("circles-a1-n1", {"phase": "Failed", "containerStatuses": [{**container, "state": state}]})
    gang.leave("circles-a1-n1")


@pytest.fixture
def gang_of(jobs: Jobs, new_operator: NewOperator) -> Any:
    def make(*flags: str) -> tuple[GangSupervisors, HeartbeatClient]:
        at_once = ("--failure-backoff-seconds=0", "--failure-backoff-max-seconds=0")
        operator = new_operator(*tls_flags(jobs.control_plane), *at_once, *flags)
        client = HeartbeatClient(jobs, operator, tls_context(jobs.control_plane))
        return GangSupervisors(client), client

    return make


def test_survivor_of_a_pod_that_exceeded_its_memory_grows_in_place(jobs: Jobs, gang_of: Any) -> None:
    gang, client = gang_of("--resize-pods=true")
    with granted(jobs.control_plane, "resizes"), running(client.operator):
        growing(jobs, gang)
        gang.wait_for_new_world()
        wait_for("the pod is replaced", lambda: all_run(jobs, {"circles-a1-n0", "circles-a2-n1"}), SECONDS)
        expected = dict.fromkeys(("circles-a1-n0", "circles-a2-n1"), ("1536Mi", "1536Mi"))
        assert memory_of(jobs) == expected, client.operator.log.read_text()
        status = jobs.status("circles")
        assert (status["memory"], status["attempts"][0]["memory"]) == ("1536Mi", "1Gi")
        assert (status["attempts"][0]["reason"], status["attempts"][1]["podAttempts"]) == ("OutOfMemory", [1, 2])
        wait_for("the event", lambda: "MemoryRaised" in {each["reason"] for each in jobs.events("circles")}, SECONDS)


def test_without_the_permission_only_the_replacement_has_more_memory(jobs: Jobs, gang_of: Any) -> None:
    """The role without chart value refuses the resize; the recovery continues."""
    gang, client = gang_of("--resize-pods=true")
    with running(client.operator):
        growing(jobs, gang)
        gang.wait_for_new_world()
        wait_for("the pod is replaced", lambda: all_run(jobs, {"circles-a1-n0", "circles-a2-n1"}), SECONDS)
        assert memory_of(jobs) == {"circles-a1-n0": ("1Gi", "1Gi"), "circles-a2-n1": ("1536Mi", "1536Mi")}
        assert client.operator.log.read_text().count("the memory of the pod circles-a1-n0 cannot be raised") == 1


def test_pods_keep_image_claim_and_user_namespace(jobs: Jobs, new_operator: NewOperator) -> None:
    """The API server of this version serves all of them, so it drops no field."""
    image = {"reference": "registry.example.com/models/sdxl:1.0", "pullPolicy": "IfNotPresent"}
    topology = {"accelerator": "gpu", "nodes": 2, "gpuClaimTemplateName": "one-gpu", "pack": "zone"}
    with running(new_operator("--user-namespaces=true")) as operator:
        jobs.create(build_job("circles", model={"base": "/finetune/model", "image": image}, topology=topology))
        wait_for("the pods exist", lambda: len(jobs.pods()) == 2, SECONDS)
        for pod in jobs.pods().values():
            spec = pod["spec"]
            assert spec["hostUsers"] is False
            assert {"name": "model", "image": image} in spec["volumes"]
            container = spec["containers"][0]
            assert {"name": "model", "mountPath": "/finetune/model", "readOnly": True} in container["volumeMounts"]
            assert spec["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "one-gpu"}]
            assert container["resources"]["claims"] == [{"name": "gpus"}]
            assert "nvidia.com/gpu" not in container["resources"].get("limits", {})
            (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "topology.kubernetes.io/zone"
        assert "ignores hostUsers" not in operator.log.read_text()


def test_gpus_of_a_claim_are_allocated(jobs: Jobs, new_operator: NewOperator) -> None:
    """The scheduler allocates devices that the driver of a node publishes; a ResourceSlice stands in for the driver."""
    api, (node,) = jobs.control_plane.api, jobs.control_plane.add_nodes(1, prefix="dra", labels={"test": "dra"})
    devices, name = "/apis/resource.k8s.io/v1", jobs.namespace
    driver = f"{name}.example.com"
    selector = {"cel": {"expression": f"device.driver == '{driver}'"}}
    made = (
        ("deviceclasses", "DeviceClass", name, {"selectors": [selector]}),
        (
            "resourceslices",
            "ResourceSlice",
            name,
            {
                "driver": driver,
                "nodeName": node,
                "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
                "devices": [{"name": "gpu-0"}, {"name": "gpu-1"}],
            },
        ),
    )
    exactly = {"exactly": {"deviceClassName": name, "count": 2}}
    template = {"spec": {"devices": {"requests": [{"name": "gpus", **exactly}]}}}
    try:
        for plural, kind, own, spec in made:
            thing = {"apiVersion": "resource.k8s.io/v1", "kind": kind, "metadata": {"name": own}, "spec": spec}
            api.create(f"{devices}/{plural}", thing)
        claim = {"kind": "ResourceClaimTemplate", "metadata": {"name": "gpus"}, "spec": template}
        api.create(f"{devices}/namespaces/{name}/resourceclaimtemplates", {"apiVersion": "resource.k8s.io/v1", **claim})
        topology = {"accelerator": "gpu", "nodes": 1, "processesPerNode": 2, "gpuClaimTemplateName": "gpus"}
        with running(new_operator()):
            jobs.create(build_job("circles", topology=topology))
            jobs.wait_phase("circles", "Running", SECONDS)
            assert jobs.pods()["circles-a1-n0"]["spec"]["nodeName"] == node
            (found,) = api.get(f"{devices}/namespaces/{name}/resourceclaims")["items"]
            results = found["status"]["allocation"]["devices"]["results"]
            assert sorted(each["device"] for each in results) == ["gpu-0", "gpu-1"]
    finally:
        for plural, _, own, _ in made:
            with contextlib.suppress(ControlPlaneApiError):
                api.delete(f"{devices}/{plural}/{own}")
        jobs.control_plane.delete_nodes([node])
