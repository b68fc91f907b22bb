"""Scheduling of a gang's pods: near each other or apart, on spot nodes or any, and with which tolerations.

All constraints are preferences, because slow training is better than none. The exceptions are `topology.pack`, and
spot, which is required unless the pod has fallen back to any node. `spec.podTemplate` is merged over this; a list
without a merge key, such as tolerations, replaces the operator's list.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels
from finetune_operator.api.job import Accelerator, FineTuneJob, FineTuneJobSpec, Pack
from finetune_operator.api.status import Capacity
from finetune_operator.manifests.resources import EFA_RESOURCE, GPU_RESOURCE, uses_efa
from finetune_operator.manifests.run_spec import num_nodes
from finetune_operator.settings import Settings

HOST = "kubernetes.io/hostname"
ZONE = "topology.kubernetes.io/zone"

NEAR: tuple[tuple[str, int], ...] = (
    (ZONE, 25),
    # AWS: the network node that a machine is connected to is that of layer 3.
    ("topology.k8s.aws/network-node-layer-1", 50),
    ("topology.k8s.aws/network-node-layer-2", 75),
    ("topology.k8s.aws/network-node-layer-3", 100),
    # GKE: a subblock is one rack.
    ("cloud.google.com/gce-topology-block", 75),
    ("cloud.google.com/gce-topology-subblock", 100),
    # NVIDIA's topograph, on any cluster: a leaf is the switch that a machine is connected to.
    ("network.topology.nvidia.com/spine", 75),
    ("network.topology.nvidia.com/leaf", 100),
)
"""Labels of nodes that share a part of the network, with weights. The scheduler ignores those that nodes do not have.

Nodes that share a switch also share the levels above it, so the weights add up. Karpenter knows only the zone, and
drops the preferences with the highest weights first, so the zone has the lowest one."""

SPOT_LABELS = (
    # Karpenter tries only the first term until that has failed, so its own label is first.
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
"""Labels of spot nodes of Karpenter, EKS, GKE and AKS. AKS also taints them; elsewhere administrators may."""


def build_placement(job: FineTuneJob, settings: Settings, capacity: Capacity | None = None) -> dict[str, Any]:
    """Return the fields of a PodSpec that control scheduling; empty fields are left out.

    Args:
        job: the job that owns the pod.
        settings: the administrator's settings.
        capacity: kind of nodes that the pod requests; None: as the spec specifies.
    """
    fields = {
        "affinity": _affinity(job, settings, capacity),
        "topologySpreadConstraints": _spread(job),
        "tolerations": _tolerations(job),
    }
    return {name: value for name, value in fields.items() if value}


def pack_label(spec: FineTuneJobSpec, settings: Settings) -> str | None:
    """Return the label of nodes whose value all pods of a job must share; None: they may run anywhere."""
    if spec.topology.pack is None or num_nodes(spec) == 1:
        return None
    return ZONE if spec.topology.pack is Pack.ZONE else settings.rack_label or None


def _affinity(job: FineTuneJob, settings: Settings, capacity: Capacity | None) -> dict[str, Any]:
    affinity: dict[str, Any] = {}
    if job.spec.recovery.spot is not None:
        affinity["nodeAffinity"] = _spot_affinity(capacity)
    if near := _pod_affinity(job, settings):
        affinity["podAffinity"] = near
    return affinity


def _pod_affinity(job: FineTuneJob, settings: Settings) -> dict[str, Any]:
    near: dict[str, Any] = {}
    if label := pack_label(job.spec, settings):
        # The scheduler places the first pod anywhere: no pod matches yet, and the pod matches its own term. Pods of
        # later attempts follow those that were kept.
        near["requiredDuringSchedulingIgnoredDuringExecution"] = [
            {"labelSelector": siblings(job), "topologyKey": label}
        ]
    if _is_gpu(job) and num_nodes(job.spec) > 1:
        # The pods exchange gradients in every step: few switches make it faster, and in one zone it is free of charge.
        near["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": weight, "podAffinityTerm": {"labelSelector": siblings(job), "topologyKey": label}}
            for label, weight in NEAR
        ]
    return near


def _spot_affinity(capacity: Capacity | None) -> dict[str, Any]:
    """Return the affinity to spot nodes: required, or preferred if the pod accepts any node."""
    terms = [{"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]} for key, value in SPOT_LABELS]
    if capacity is Capacity.ANY:
        # Karpenter, too, tries preferences first and drops those that it cannot satisfy.
        weighted = [{"weight": 50, "preference": term} for term in terms]
        return {"preferredDuringSchedulingIgnoredDuringExecution": weighted}
    # Terms are alternatives: no node has the labels of two providers.
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}


def _spread(job: FineTuneJob) -> list[dict[str, Any]]:
    """Spread CPU pods over nodes: two on one node would share its memory bandwidth and its failures."""
    if _is_gpu(job) or num_nodes(job.spec) == 1:
        return []
    return [{"maxSkew": 1, "topologyKey": HOST, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": siblings(job)}]


def _tolerations(job: FineTuneJob) -> list[dict[str, Any]]:
    tolerations: list[dict[str, Any]] = []
    if _is_gpu(job):
        # By convention nodes with GPUs have this taint, which keeps other pods away.
        tolerations.append({"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    if uses_efa(job.spec.topology):
        tolerations.append({"key": EFA_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    if job.spec.recovery.spot is not None:
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in SPOT_LABELS
        ]
    return tolerations


def siblings(job: FineTuneJob) -> dict[str, Any]:
    """Return the selector of all pods of a job."""
    return {"matchLabels": {labels.JOB: job.metadata.name}}


def _is_gpu(job: FineTuneJob) -> bool:
    return job.spec.topology.accelerator is Accelerator.GPU
