"""Scheduling of pods: near each other or apart, on spot nodes or any."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.manifests import build_pod
from finetune_operator.manifests.placement import NEAR, SPOT_LABELS
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import make_job

GPU = {"accelerator": "gpu", "nodes": 2}
CPU = {"accelerator": "cpu", "nodes": 2}
GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
SIBLINGS = {"matchLabels": {"finetune-operator.io/job": "circles"}}


def spec_of(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = build_pod(make_job(**spec), 1, 0, Settings())["spec"]
    return found


def test_gpu_pods_prefer_nodes_that_share_switches_and_a_zone() -> None:
    spec = spec_of(topology=GPU)
    preferences = spec["affinity"].pop("podAffinity").pop("preferredDuringSchedulingIgnoredDuringExecution")
    assert all(preference["podAffinityTerm"]["labelSelector"] == SIBLINGS for preference in preferences)
    weights = {preference["podAffinityTerm"]["topologyKey"]: preference["weight"] for preference in preferences}
    assert weights["topology.kubernetes.io/zone"] == min(weights.values())
    layers = [weights[f"topology.k8s.aws/network-node-layer-{layer}"] for layer in (1, 2, 3)]
    assert layers == sorted(layers)
    assert weights["cloud.google.com/gce-topology-block"] < weights["cloud.google.com/gce-topology-subblock"]
    assert weights["network.topology.nvidia.com/spine"] < weights["network.topology.nvidia.com/leaf"]
    # Nothing is required: a gang that fits under no switch is still scheduled.
    assert spec["affinity"] == {}
    assert "topologySpreadConstraints" not in spec
    assert spec["tolerations"] == [GPU_TOLERATION]


def test_pods_with_network_adapters_tolerate_their_taint() -> None:
    spec = spec_of(topology={**GPU, "resources": {"vpc.amazonaws.com/efa": 4}})
    taint = {"key": "vpc.amazonaws.com/efa", "operator": "Exists", "effect": "NoSchedule"}
    assert spec["tolerations"] == [GPU_TOLERATION, taint]


def test_cpu_pods_prefer_different_nodes() -> None:
    spec = spec_of(topology=CPU)
    (constraint,) = spec["topologySpreadConstraints"]
    assert constraint == {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": SIBLINGS,
    }
    assert not {"affinity", "tolerations"} & spec.keys()


@pytest.mark.parametrize("topology", [{"accelerator": "cpu"}, {"accelerator": "gpu", "nodes": 1}])
def test_single_pod_has_no_affinity(topology: dict[str, Any]) -> None:
    assert not {"affinity", "topologySpreadConstraints"} & spec_of(topology=topology).keys()


@pytest.mark.parametrize(
    ("pack", "label"), [("zone", "topology.kubernetes.io/zone"), ("rack", "network.topology.nvidia.com/leaf")]
)
@pytest.mark.parametrize("topology", [GPU, CPU], ids=["gpu", "cpu"])
def test_packed_pods_require_one_domain(topology: dict[str, Any], pack: str, label: str) -> None:
    settings = Settings(rack_label="network.topology.nvidia.com/leaf")
    job = make_job(topology={**topology, "pack": pack})
    affinity = build_pod(job, 1, 0, settings)["spec"]["affinity"]["podAffinity"]
    required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required == [{"labelSelector": SIBLINGS, "topologyKey": label}]
    # Within the zone, a pod still prefers the switch of its peers.
    preferred = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    assert len(preferred) == (len(NEAR) if topology is GPU else 0)


def test_single_packed_pod_waits_for_no_peer() -> None:
    assert "affinity" not in spec_of(topology={"accelerator": "gpu", "nodes": 1, "pack": "zone"})


def test_selector_matches_the_pods_of_the_job() -> None:
    pod = build_pod(make_job(topology=GPU), 2, 1, Settings())
    assert SIBLINGS["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_spot_requires_spot_nodes_of_any_provider_and_tolerates_their_taints() -> None:
    spec = spec_of(topology=GPU, recovery={"spot": {}})
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    required_labels = {}
    for term in required["nodeSelectorTerms"]:
        (expression,) = term["matchExpressions"]
        assert expression["operator"] == "In"
        (required_labels[expression["key"]],) = expression["values"]
    assert required_labels == dict(SPOT_LABELS)
    assert spec["tolerations"][0] == GPU_TOLERATION
    assert {toleration["key"]: toleration["value"] for toleration in spec["tolerations"][1:]} == required_labels
    assert "podAffinity" in spec["affinity"]


def test_pod_template_takes_precedence() -> None:
    template = {
        "spec": {
            "affinity": {"nodeAffinity": None},
            "tolerations": [{"key": "mine", "operator": "Exists"}],
            "topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname", "$patch": "delete"}],
        }
    }
    spec = spec_of(topology=CPU, recovery={"spot": {}}, podTemplate=template)
    assert spec["affinity"] == {}
    assert spec["tolerations"] == [{"key": "mine", "operator": "Exists"}]
    assert spec["topologySpreadConstraints"] == []
