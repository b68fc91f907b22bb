"""Builds the PodGroup of an attempt, and makes its pods members. Pure.

Only the pods that the attempt creates are members: kept pods have their nodes already. So an attempt that replaces one
pod has no PodGroup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_operator.api import gangs, labels
from finetune_operator.api.job import FineTuneJob, SchedulingMode
from finetune_operator.manifests.metadata import build_metadata, job_labels

WITH_PRIORITY = frozenset({"scheduling.k8s.io/v1beta1", *gangs.SERVED_VERSIONS[SchedulingMode.VOLCANO]})
"""API versions whose PodGroup has a priority of its own; in older versions it is behind another feature gate."""


@dataclass(frozen=True)
class GangMembership:
    """How a pod belongs to its gang."""

    mode: SchedulingMode
    group: str = ""
    """Name of the PodGroup; empty: the mode has none."""


def group_name(job: str, attempt: int) -> str:
    """Return the name of an attempt's PodGroup."""
    return f"{job}-a{attempt}"


@dataclass(frozen=True)
class GroupOptions:
    """What the PodGroup of one attempt depends on besides its job."""

    mode: SchedulingMode
    """Which API it belongs to."""
    api_version: str
    """A version of that API that the cluster serves."""
    least: int
    """Number of pods that receive nodes together."""
    pack_label: str | None = None
    """Label of nodes whose value all pods must share; None: they may run anywhere."""


def build_group(job: FineTuneJob, attempt: int, options: GroupOptions) -> dict[str, Any]:
    """Return the PodGroup of an attempt."""
    own = job_labels(job.metadata.name) | {labels.ATTEMPT: str(attempt)}
    return {
        "apiVersion": options.api_version,
        "kind": gangs.POD_GROUP,
        "metadata": build_metadata(job, group_name(job.metadata.name, attempt), own),
        "spec": _group_spec(job, options),
    }


def _group_spec(job: FineTuneJob, options: GroupOptions) -> dict[str, Any]:
    spec: dict[str, Any]
    if options.mode is SchedulingMode.POD_GROUP:
        spec = {"schedulingPolicy": {"gang": {"minCount": options.least}}}
    else:
        spec = {"minMember": options.least}
    if options.mode is SchedulingMode.POD_GROUP and options.pack_label is not None:
        # The API server drops this field if its feature gate is off; the affinity of the pods then packs them.
        spec["schedulingConstraints"] = {"topology": [{"key": options.pack_label}]}
    if options.mode is SchedulingMode.VOLCANO and (queue := _volcano_queue(job)):
        spec["queue"] = queue
    if options.api_version in WITH_PRIORITY and job.spec.priority_class_name:
        spec["priorityClassName"] = job.spec.priority_class_name
    return spec


def join_gang(pod: dict[str, Any], membership: GangMembership) -> dict[str, Any]:
    """Return a pod as a member of its gang. A scheduler that podTemplate names is kept."""
    meta, spec, mode = dict(pod["metadata"]), dict(pod["spec"]), membership.mode
    if mode is SchedulingMode.GATES:
        others = [gate for gate in spec.get("schedulingGates") or () if gate.get("name") != gangs.GATE]
        spec["schedulingGates"] = [*others, {"name": gangs.GATE}]
    elif mode is SchedulingMode.POD_GROUP:
        spec["schedulingGroup"] = {"podGroupName": membership.group}
    elif mode is SchedulingMode.VOLCANO:
        meta["annotations"] = {**(meta.get("annotations") or {}), gangs.VOLCANO_GROUP: membership.group}
    elif mode is SchedulingMode.COSCHEDULING:
        meta["labels"] = {**meta["labels"], gangs.COSCHEDULING_GROUP: membership.group}
    if mode in gangs.SCHEDULERS:
        spec.setdefault("schedulerName", gangs.SCHEDULERS[mode])
    return {**pod, "metadata": meta, "spec": spec}


def _volcano_queue(job: FineTuneJob) -> str | None:
    metadata = (job.spec.pod_template or {}).get("metadata") or {}
    return (metadata.get("annotations") or {}).get(gangs.VOLCANO_QUEUE)
