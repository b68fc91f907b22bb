"""A real API server accepts every kind of pod in a namespace with the restricted Pod Security Standard."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import pod_name
from finetune_operator.manifests import build_config, build_pod, build_service, num_nodes
from finetune_operator.manifests.placement import SPOT_LABELS
from finetune_operator.settings import Settings
from testing.controlplane.api import Api, ControlPlaneApiError
from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane
from tests.plan.fake_cluster import make_job

SETTINGS = Settings(coordinator_url="https://coordinator:8443", coordinator_ca_config="ca", cache_claim="cache")
STORAGE = {"storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}}}
WAIT_SECONDS = 60.0
PAIR = "test/pair"
"""Label of the two nodes of one test."""

VARIANTS: dict[str, dict[str, Any]] = {
    "gpu": {"topology": {"accelerator": "gpu"}},
    "gpu, several nodes": {
        "topology": {
            "accelerator": "gpu",
            "nodes": 2,
            "processesPerNode": 8,
            "resources": {"cpu": 32, "memory": "256Gi", "rdma/hca": 1},
        }
    },
    "gpu, network adapters": {
        "topology": {
            "accelerator": "gpu",
            "nodes": 2,
            "resources": {"memory": "256Gi", "vpc.amazonaws.com/efa": 4, "hugepages-2Mi": "5Gi"},
        }
    },
    "cpu, gloo": {"topology": {"accelerator": "cpu", "nodes": 2}},
    "cpu, ccl": {
        "topology": {
            "accelerator": "cpu",
            "nodes": 2,
            "processesPerNode": 2,
            "resources": {"cpu": "7500m", "memory": "1.5Gi"},
            "cpu": {"backend": "ccl"},
        }
    },
    "spot": {"topology": {"accelerator": "gpu", "nodes": 2}, "recovery": {"spot": {}, "noticeSeconds": 25}},
    "image": {
        "model": {"base": "/finetune/model", "image": {"reference": "registry.example.com/sdxl:1.0"}},
    },
    "claim": {
        "topology": {
            "accelerator": "gpu",
            "nodes": 2,
            "processesPerNode": 2,
            "gpuClaimTemplateName": "two-gpus",
            "pack": "zone",
        }
    },
    "secrets and priority": {
        "secrets": [{"name": "hub"}],
        "priorityClassName": "system-node-critical",
    },
    "podTemplate": {
        "topology": {"accelerator": "cpu", "nodes": 2},
        "recovery": {"spot": {}},
        "podTemplate": {
            "metadata": {"labels": {"team": "art"}, "annotations": {"example.com/a": "b"}},
            "spec": {
                "nodeSelector": {"disk": "fast"},
                "tolerations": [{"key": "mine", "operator": "Exists"}],
                "imagePullSecrets": [{"name": "registry"}],
                "topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname", "maxSkew": 2}],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
                "containers": [
                    {
                        "name": "trainer",
                        "image": "mine",
                        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
                        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                    }
                ],
            },
        },
    },
}


@pytest.fixture(scope="session")
def restricted(control_plane: ControlPlane) -> str:
    """A namespace that enforces the restricted standard."""
    enforced = {
        "pod-security.kubernetes.io/enforce": "restricted",
        "pod-security.kubernetes.io/enforce-version": "latest",
    }
    return control_plane.create_namespace("restricted-pods", enforced)


def job_in(namespace: str, **spec: Any) -> FineTuneJob:
    job = make_job(**{"checkpoint": STORAGE} | spec)
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": namespace})})


def dry_run(api: Api, manifest: dict[str, Any]) -> Any:
    """Submit an object for admission and validation; nothing is stored."""
    plural = {"Pod": "pods", "Service": "services", "ConfigMap": "configmaps"}[manifest["kind"]]
    path = f"/api/v1/namespaces/{manifest['metadata']['namespace']}/{plural}?dryRun=All&fieldValidation=Strict"
    return api.create(path, manifest)


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_object_of_a_job_is_accepted(control_plane: ControlPlane, restricted: str, spec: dict[str, Any]) -> None:
    job = job_in(restricted, **spec)
    for manifest in (build_service(job, SETTINGS), build_config(job)):
        dry_run(control_plane.api, manifest)
    for node_rank in range(num_nodes(job.spec)):
        pod = build_pod(job, 1, node_rank, SETTINGS)
        stored = dry_run(control_plane.api, pod)
        # The API server stores our values; no admission plugin replaces them.
        kept = ("hostname", "subdomain", "affinity", "topologySpreadConstraints", "securityContext")
        for field in (*kept, "resourceClaims", "hostUsers"):
            assert stored["spec"].get(field) == pod["spec"].get(field)
        claims = [each["spec"]["containers"][0]["resources"].get("claims") for each in (stored, pod)]
        assert claims[0] == claims[1]
        assert stored["spec"]["terminationGracePeriodSeconds"] == job.spec.recovery.notice_seconds


def test_restricted_namespace_refuses_host_path(control_plane: ControlPlane, restricted: str) -> None:
    """The namespace really enforces the standard; on such a cluster jobs need a claim or NFS."""
    job = job_in(restricted, checkpoint={"storage": {"hostPath": {"path": "/mnt"}}})
    with pytest.raises(ControlPlaneApiError, match='violates PodSecurity "restricted:latest": restricted volume types'):
        dry_run(control_plane.api, build_pod(job, 1, 0, SETTINGS))


@pytest.fixture(params=SPOT_LABELS, ids=lambda label: str(label[0]))
def spot_node(control_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A provider's spot node and an ordinary node, both with the label PAIR of this provider."""
    key, value = request.param
    pair = key.replace("/", ".")
    (plain,) = control_plane.add_nodes(1, prefix="plain", labels={PAIR: pair})
    taint = {"key": key, "value": value, "effect": "NoSchedule"}
    (spot,) = control_plane.add_nodes(1, prefix="spot", labels={key: value, PAIR: pair}, taints=[taint])
    yield spot, pair
    control_plane.delete_nodes([plain, spot])


def test_spot_job_is_scheduled_on_spot_nodes(
    control_plane: ControlPlane, namespace: str, spot_node: tuple[str, str]
) -> None:
    spot, pair = spot_node
    # The scheduler may not have noticed yet that the nodes of the previous provider are deleted.
    template = {"spec": {"nodeSelector": {PAIR: pair}}}
    job = job_in(namespace, recovery={"spot": {}}, checkpoint={}, podTemplate=template)
    api, path = control_plane.api, f"/api/v1/namespaces/{namespace}/pods"
    for node_rank in range(2):
        pod = build_pod(job, 1, node_rank, Settings())
        # The job does not exist: if another test has installed the CRD, the garbage collector would delete the pod.
        del pod["metadata"]["ownerReferences"]
        api.create(path, pod)

    def nodes() -> set[str]:
        return {pod["spec"].get("nodeName") for pod in api.get(path)["items"]}

    wait_for("the pods are on the spot node", lambda: nodes() == {spot}, WAIT_SECONDS)


@pytest.mark.parametrize("pack", ["zone", "rack"])
def test_packed_pods_share_a_domain_and_replacements_join_it(
    control_plane: ControlPlane, namespace: str, pack: str
) -> None:
    """The domain of the first pod has two nodes for pods, and the other domain has more."""
    rack = "network.topology.nvidia.com/leaf"
    label = rack if pack == "rack" else "topology.kubernetes.io/zone"
    ours = {PAIR: namespace}
    first, second, *far = (
        control_plane.add_nodes(1, prefix=pack, gpus=1, labels={**ours, label: domain})[0] for domain in "aabbb"
    )
    template = {"spec": {"nodeSelector": ours}}
    job = job_in(
        namespace, topology={"accelerator": "gpu", "nodes": 3, "pack": pack}, checkpoint={}, podTemplate=template
    )
    api, path = control_plane.api, f"/api/v1/namespaces/{namespace}/pods"

    def create(attempt: int, node_rank: int, node: str | None = None) -> str:
        pod = build_pod(job, attempt, node_rank, Settings(cores_per_rank=0, rack_label=rack))
        del pod["metadata"]["ownerReferences"]
        if node is not None:
            pod["spec"]["nodeName"] = node
        return str(api.create(path, pod)["metadata"]["name"])

    def waits(name: str) -> bool:
        conditions = api.get(f"{path}/{name}")["status"].get("conditions") or ()
        return any("didn't match pod affinity rules" in condition.get("message", "") for condition in conditions)

    try:
        lost, kept = create(1, 0, first), create(1, 1)
        wait_for("the second pod has a node", functools.partial(node_of, api, f"{path}/{kept}"), WAIT_SECONDS)
        assert node_of(api, f"{path}/{kept}") == second
        wait_for("the third pod waits", functools.partial(waits, create(1, 2)), WAIT_SECONDS)
        for name in (lost, pod_name(job.metadata.name, 1, 2)):
            api.delete(f"{path}/{name}", 0)
        replacement = create(2, 0)
        wait_for("the replacement has a node", functools.partial(node_of, api, f"{path}/{replacement}"), WAIT_SECONDS)
        assert node_of(api, f"{path}/{replacement}") == first
    finally:
        control_plane.delete_nodes([first, second, *far])


def node_of(api: Api, path: str) -> str:
    return str(api.get(path)["spec"].get("nodeName", ""))


@pytest.mark.parametrize(
    ("switch", "block"),
    [
        ("topology.k8s.aws/network-node-layer-3", "topology.k8s.aws/network-node-layer-2"),
        ("network.topology.nvidia.com/leaf", "network.topology.nvidia.com/spine"),
    ],
)
def test_pods_of_a_job_are_scheduled_near_each_other(
    control_plane: ControlPlane, namespace: str, switch: str, block: str
) -> None:
    """The first pod has a neighbour at its switch, and one in its block. The second and the third pod take them."""
    ours = {PAIR: namespace, "topology.kubernetes.io/zone": namespace}
    first, neighbour, near, *far = (
        control_plane.add_nodes(1, prefix="switch", gpus=1, labels={**ours, switch: at, block: within})[0]
        for at, within in (("s1", "b1"), ("s1", "b1"), ("s2", "b1"), ("s3", "b2"), ("s3", "b2"), ("s4", "b2"))
    )
    template = {"spec": {"nodeSelector": {PAIR: namespace}}}
    job = job_in(namespace, topology={"accelerator": "gpu", "nodes": 3}, checkpoint={}, podTemplate=template)
    api, path = control_plane.api, f"/api/v1/namespaces/{namespace}/pods"
    try:
        for node_rank, node in enumerate((first, neighbour, near)):
            pod = build_pod(job, 1, node_rank, Settings(cores_per_rank=0))
            # The job does not exist: if another test has installed the CRD, the garbage collector would delete the pod.
            del pod["metadata"]["ownerReferences"]
            if node_rank == 0:
                pod["spec"]["nodeName"] = node
            name = api.create(path, pod)["metadata"]["name"]
            wait_for("the pod has a node", functools.partial(node_of, api, f"{path}/{name}"))
            assert node_of(api, f"{path}/{name}") == node
    finally:
        control_plane.delete_nodes([first, neighbour, near, *far])
