"""Where the pods of a gang go: near each other or apart, on spot nodes or on any, and what they put up with there.

Wishes, but for spot (which is one, too, for pods that fell back from it): a gang that cannot be placed ideally trains
more slowly, one that is not placed not at all.
`spec.podTemplate` is laid over this; a list without a merge key, such as tolerations, replaces ours as a whole.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.api import labels
from finetune_operator.api.job import Accelerator, Capacity, FineTuneJob
from finetune_operator.manifests.resources import GPU_RESOURCE
from finetune_operator.manifests.run_spec import num_nodes

ZONE = "topology.kubernetes.io/zone"
HOST = "kubernetes.io/hostname"

SPOT_LABELS = (
    # Karpenter looks at the first term alone until that has failed, so its own label comes first.
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
"""How Karpenter, EKS, GKE and AKS label their spot nodes. AKS taints them so, too; elsewhere administrators do."""


def build_placement(job: FineTuneJob, capacity: Capacity | None = None) -> dict[str, Any]:
    """The fields of a PodSpec that say where the pod goes; only those that say something.

    Args:
        job: whose pod it is.
        capacity: the nodes that it may take, where that is not simply what the spec says.
    """
    fields = {
        "affinity": _affinity(job, capacity),
        "topologySpreadConstraints": _spread(job),
        "tolerations": _tolerations(job),
    }
    return {name: value for name, value in fields.items() if value}


def _affinity(job: FineTuneJob, capacity: Capacity | None) -> dict[str, Any]:
    affinity: dict[str, Any] = {}
    if job.spec.recovery.spot is not None:
        affinity["nodeAffinity"] = _spot_affinity(capacity)
    if _is_gpu(job) and num_nodes(job.spec) > 1:
        # Gradients travel between the pods in every step: within a zone they are faster and cost nothing.
        near = {"labelSelector": _siblings(job), "topologyKey": ZONE}
        affinity["podAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": near}]
        }
    return affinity


def _spot_affinity(capacity: Capacity | None) -> dict[str, Any]:
    """Spot nodes and no others, or only rather than others."""
    terms = [{"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]} for key, value in SPOT_LABELS]
    if capacity is Capacity.ANY:
        # Karpenter, too, tries what is preferred first, and lets go of it where it cannot be had.
        weighted = [{"weight": 50, "preference": term} for term in terms]
        return {"preferredDuringSchedulingIgnoredDuringExecution": weighted}
    # Terms are alternatives: no node has the labels of two providers.
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}


def _spread(job: FineTuneJob) -> list[dict[str, Any]]:
    """CPU pods go to different nodes: two on one would share its memory bandwidth, and its end."""
    if _is_gpu(job) or num_nodes(job.spec) == 1:
        return []
    return [{"maxSkew": 1, "topologyKey": HOST, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": _siblings(job)}]


def _tolerations(job: FineTuneJob) -> list[dict[str, Any]]:
    tolerations: list[dict[str, Any]] = []
    if _is_gpu(job):
        # Nodes with GPUs are tainted so, by custom, against pods that need none.
        tolerations.append({"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    if job.spec.recovery.spot is not None:
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in SPOT_LABELS
        ]
    return tolerations


def _siblings(job: FineTuneJob) -> dict[str, Any]:
    return {"matchLabels": {labels.JOB: job.metadata.name}}


def _is_gpu(job: FineTuneJob) -> bool:
    return job.spec.topology.accelerator is Accelerator.GPU
